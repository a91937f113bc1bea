"""What the explaining tabs show, as HTML made from results: no widgets here, so that tests need no browser."""
