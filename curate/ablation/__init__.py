"""Arms of a pipeline, trained and compared over paired seeds."""
