"""Tables (folders of Parquet files at URIs): schemas, columns, storage, reader and writer, output folders."""
