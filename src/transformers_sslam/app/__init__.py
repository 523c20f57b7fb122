"""A page to listen with: what a model finds in a recording, picture and sound. Gradio draws the page; imported when one is made."""
