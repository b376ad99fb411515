"""A local S3 server that can fail, and machines that promote at it."""
