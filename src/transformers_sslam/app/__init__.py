"""A page to listen with: a model's events in a recording, seen and heard. Gradio draws the page; it is imported when a page is made."""
