"""One file a format: from bytes to rows, each value as it is written."""
