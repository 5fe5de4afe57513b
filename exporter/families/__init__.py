"""Model families, one file per `model_type` of config.json."""
