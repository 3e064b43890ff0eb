"""Folders of Parquet files at URIs: schemas, columns, storage, the table reader and writer, the output folder."""
