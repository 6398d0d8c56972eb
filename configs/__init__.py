"""One file per recipe; each returns a whole ConfigDict."""
