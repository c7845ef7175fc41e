def available():
    return "none yet"
