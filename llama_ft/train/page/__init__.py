"""report.html: what a run did, as one HTML file that a browser opens from anywhere. No torch here."""
