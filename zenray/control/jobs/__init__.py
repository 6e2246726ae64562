"""Jobs that people submitted: what was asked, how far it is, and what happened."""
