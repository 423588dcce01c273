"""The playground: a page on this machine where one picture meets one model."""
