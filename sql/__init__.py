"""Analysis: one `.sql` file a table; the file name is the table name."""
