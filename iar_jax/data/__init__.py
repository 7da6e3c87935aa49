"""Images and code records: sources, preprocessing, loaders."""
