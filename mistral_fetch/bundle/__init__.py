"""Complete models as one stream that standard tar unpacks: written, checked and taken in; see ``docs/air-gap.md``."""
