"""What bench/training.py compares with in processes of their own."""
