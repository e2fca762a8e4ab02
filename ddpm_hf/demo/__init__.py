"""Demos of a trained model: a page that runs it in a browser, and a Gradio app."""
