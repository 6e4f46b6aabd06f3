"""Settings as text: A1111's form, those of other programs, where they lie in a picture's file. No torch here."""
