"""The config: every field once, its checks, and the command line that sets it."""
