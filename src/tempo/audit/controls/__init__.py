"""What attacks must break before they count: small victims, weakened schemes, and the run of all controls."""
