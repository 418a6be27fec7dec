"""What every report is made of: text, tables, pages, charts."""
