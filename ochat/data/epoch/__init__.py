"""Choose what an epoch trains on: the conversations of a mixture, and the condition of each."""
