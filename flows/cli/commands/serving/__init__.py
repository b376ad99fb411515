"""The commands about a Prefect server: setup, up and down."""
