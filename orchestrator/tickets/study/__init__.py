"""What a study says of its tickets: their table, structure, stability and files."""
