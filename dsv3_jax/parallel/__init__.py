"""Where arrays live and how programs are compiled."""
