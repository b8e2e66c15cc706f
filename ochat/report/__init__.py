"""A run as one HTML page: `ochat report RUN`."""
