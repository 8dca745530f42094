"""The wire between the trusted process and its workers: addresses, messages, frames, channels.

Shared by both sides, so nothing here may hold a key or know a scheme.
"""
