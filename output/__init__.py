"""How files are written, locked, sealed and recorded, and how numbers are printed; imports no other room."""
