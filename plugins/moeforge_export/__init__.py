"""The verb `export`: a checkpoint in the form that another runtime reads."""
