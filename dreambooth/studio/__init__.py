"""The studio: a page on which runs are made, watched and used. It alone imports NiceGUI."""
