"""Which backends exist, and are they well."""
