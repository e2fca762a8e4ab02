"""A page that runs a trained model in a browser."""
