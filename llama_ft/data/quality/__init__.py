"""Quality steps for raw text: published rules, a room each; `steps` puts them in a row."""
