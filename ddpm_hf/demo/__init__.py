"""Demos of a trained model: a Gradio app, and a page that runs in the browser."""
