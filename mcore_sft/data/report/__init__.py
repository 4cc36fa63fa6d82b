"""What a packed dataset holds, for people: tables, a page, coloured text."""
