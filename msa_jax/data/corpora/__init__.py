"""Sources of given documents and questions: read, cut, asked."""
