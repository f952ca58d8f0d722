"""The dashboard: its pages (``static/``), and the relay by which ``skep ui`` opens them."""
