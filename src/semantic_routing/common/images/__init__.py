"""Pictures: decoded safely whatever they are, as viewers show them, and saved."""
