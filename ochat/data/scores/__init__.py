"""What is known of records beside their text, by record id: token scores and weights, and rewards."""
