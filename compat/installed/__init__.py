"""What is installed and what it can do; attributes replaced and put back."""
