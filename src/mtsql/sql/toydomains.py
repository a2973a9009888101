"""The words of the embedded world: which things its databases are about, which columns they have, which values."""

# (thing, what it belongs to): one database each. Plurals are regular. A held-out pair never occurs in training, but
# each of its words does, in another database: a model that starts from nothing can only know words it has met.
TRAIN_DOMAINS = (
    ("singer", "band"), ("song", "album"), ("album", "band"), ("concert", "stadium"), ("fan", "singer"),
    ("player", "club"), ("trainer", "team"), ("runner", "race"), ("driver", "team"), ("fan", "club"),
    ("student", "school"), ("teacher", "college"), ("course", "teacher"), ("book", "author"), ("poem", "author"),
    ("writer", "paper"), ("poem", "magazine"), ("book", "store"), ("movie", "studio"), ("actor", "movie"),
    ("movie", "director"), ("show", "channel"), ("actor", "theater"), ("dancer", "show"), ("car", "maker"),
    ("phone", "brand"), ("laptop", "brand"), ("car", "shop"), ("employee", "firm"), ("worker", "plant"),
    ("manager", "shop"), ("doctor", "hospital"), ("nurse", "clinic"), ("patient", "doctor"), ("visit", "clinic"),
    ("pilot", "airline"), ("plane", "airline"), ("flight", "airport"), ("train", "station"), ("ship", "port"),
    ("captain", "ship"), ("meal", "cook"), ("cook", "restaurant"), ("wine", "region"), ("game", "store"),
    ("room", "hotel"), ("guest", "room"), ("horse", "farm"), ("tree", "park"), ("bridge", "river"),
    ("painting", "artist"), ("painting", "museum"), ("house", "owner"), ("horse", "owner"), ("lake", "region"),
    ("artist", "museum"), ("meal", "hotel"), ("manager", "team"), ("visit", "park"), ("station", "river"),
)  # fmt: skip
DEV_DOMAINS = (
    ("song", "band"), ("player", "team"), ("student", "college"), ("nurse", "hospital"), ("actor", "show"),
    ("laptop", "shop"), ("worker", "firm"), ("poem", "writer"), ("pilot", "plane"), ("meal", "restaurant"),
    ("guest", "hotel"), ("tree", "farm"),
)  # fmt: skip

# Column -> the values its rows may have, as a question spells them.
CATEGORIES = {
    "country": ("usa", "france", "japan", "brazil", "kenya", "india", "spain"),
    "city": ("new york", "paris", "tokyo", "lima", "cairo", "rome", "oslo"),
    "color": ("red", "blue", "green", "black", "white", "gold"),
    "genre": ("rock", "jazz", "pop", "folk", "drama", "comedy"),
    "status": ("active", "closed", "new", "retired", "on hold"),
    "level": ("junior", "senior", "expert", "beginner"),
    "type": ("small", "large", "classic", "modern"),
    "language": ("english", "french", "hindi", "arabic", "thai"),
}
# Column -> (lowest, highest, step) of its values.
NUMBERS = {
    "age": (18, 70, 1),
    "year": (1980, 2020, 1),
    "price": (10, 300, 5),
    "rating": (1, 10, 1),
    "weight": (40, 120, 2),
    "score": (0, 100, 5),
    "budget": (100, 900, 50),
    "size": (5, 95, 5),
}
FIRST = ("anna", "ben", "carl", "dora", "eva", "finn", "gina", "hugo", "iris", "john", "kara", "leo", "mona", "nils")
LAST = ("adams", "baker", "clark", "davis", "evans", "ford", "gray", "hill", "jones", "king", "lane", "moore")
