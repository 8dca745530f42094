"""Models, data and the training loop behind ``tempo train``; nothing here knows a mask or a key."""
