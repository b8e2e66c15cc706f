"""What files hold, by what they are: texts, compressed or not, and tables."""
