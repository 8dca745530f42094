"""What an audit found: as JSON, as a page to look at, and as the threat matrix of the documentation."""
