"""The dashboard: its pages (``static/``), and the relay through which ``skep ui`` opens them."""
