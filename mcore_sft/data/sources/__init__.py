"""Files and hub datasets in, blocks of rows in columns out."""
