"""The words of the embedded world: the things that its databases are about, their columns, and the
values of these columns."""

# (thing, what it belongs to): one database each. Plurals are regular. A held-out pair never occurs
# in training, but each of its words occurs in another training database, because a model that
# starts from nothing knows only the words that it has seen.
TRAIN_DOMAINS = (
    ("singer", "band"),
    ("song", "album"),
    ("album", "band"),
    ("concert", "stadium"),
    ("fan", "singer"),
    ("player", "club"),
    ("trainer", "team"),
    ("runner", "race"),
    ("driver", "team"),
    ("fan", "club"),
    ("student", "school"),
    ("teacher", "college"),
    ("course", "teacher"),
    ("book", "author"),
    ("poem", "author"),
    ("writer", "paper"),
    ("poem", "magazine"),
    ("book", "store"),
    ("movie", "studio"),
    ("actor", "movie"),
    ("movie", "director"),
    ("show", "channel"),
    ("actor", "theater"),
    ("dancer", "show"),
    ("car", "maker"),
    ("phone", "brand"),
    ("laptop", "brand"),
    ("car", "shop"),
    ("employee", "firm"),
    ("worker", "plant"),
    ("manager", "shop"),
    ("doctor", "hospital"),
    ("nurse", "clinic"),
    ("patient", "doctor"),
    ("visit", "clinic"),
    ("pilot", "airline"),
    ("plane", "airline"),
    ("flight", "airport"),
    ("train", "station"),
    ("ship", "port"),
    ("captain", "ship"),
    ("meal", "cook"),
    ("cook", "restaurant"),
    ("wine", "region"),
    ("game", "store"),
    ("room", "hotel"),
    ("guest", "room"),
    ("horse", "farm"),
    ("tree", "park"),
    ("bridge", "river"),
    ("painting", "artist"),
    ("painting", "museum"),
    ("house", "owner"),
    ("horse", "owner"),
    ("lake", "region"),
    ("artist", "museum"),
    ("meal", "hotel"),
    ("manager", "team"),
    ("visit", "park"),
    ("station", "river"),
)
DEV_DOMAINS = (
    ("song", "band"),
    ("player", "team"),
    ("student", "college"),
    ("nurse", "hospital"),
    ("actor", "show"),
    ("laptop", "shop"),
    ("worker", "firm"),
    ("poem", "writer"),
    ("pilot", "plane"),
    ("meal", "restaurant"),
    ("guest", "hotel"),
    ("tree", "farm"),
)

# Column -> the values its rows may have, as a question spells them.
CATEGORIES = {
    "country": ("usa", "france", "japan", "brazil"),
    "city": ("paris", "tokyo", "lima", "cairo"),
    "color": ("red", "blue", "green", "black"),
    "genre": ("rock", "jazz", "pop", "folk"),
    "status": ("active", "closed", "new", "retired"),
    "level": ("junior", "senior", "expert", "beginner"),
    "type": ("small", "large", "classic", "modern"),
    "language": ("english", "french", "hindi", "arabic"),
}
# Column -> (lowest value, highest value, distance between values, distance between the values that
# questions compare with).
NUMBERS = {
    "age": (18, 70, 1, 10),
    "year": (1980, 2020, 1, 10),
    "price": (10, 300, 5, 50),
    "rating": (1, 10, 1, 1),
    "weight": (40, 120, 2, 10),
    "score": (0, 100, 5, 10),
    "budget": (100, 900, 50, 100),
    "size": (5, 95, 5, 10),
}
NAMES = tuple(
    "anna ben carl dora eva finn gina hugo iris john kara leo mona nils olga paul quinn rita sven "
    "tina ugo vera walt xena yuri zoe adam beth cleo dirk elsa fred greta hans ida jack kate lars "
    "maya noah otis pia ralf sara tom uma vito wanda xaver yara abel bruno clara dan erik flora "
    "gus heidi ines jonas klara lena milo nora oskar petra rosa simon tara ulla victor".split()
)
"""Names of rows. Each is one word, so it is copied in one piece."""
