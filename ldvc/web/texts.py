"""The sentences of the page and its Segment tab; those of the other tabs are in tabs/texts.py."""

TITLE = "LDVC"
TAGLINE = "Type any class names. See which pixels they are, and which names each patch attends to."
ABOUT = (
    "Language-driven visual consensus: a frozen CLIP, prompts, and a small decoder in which patches agree with their "
    "look-alikes (<em>local-consensus self-attention</em>, LCSA) before they attend to the class names."
)

PHOTO_LABEL = "Photo"
PHOTO_HINT = "Drop a photo here, paste one, or click to choose"
EXAMPLES_LABEL = "Or take an example"
NAMES_LABEL = "Class names"
NAMES_INFO = "English nouns, separated by commas; “sofa | couch” are two words for one class."
NAMES_PLACEHOLDER = "dog, grass, cat"
RUN = "Segment"
ALIKE = "The model reads English nouns and cannot tell {names} apart: which of them a pixel gets means nothing."
STALE = "The answer to an older question; press Segment."
CHIPS_LABEL = "Classes that will be asked for"
CHIPS_COUNT = "{all} classes, of which the model saw masks of {seen} in training."
REMOVE = "Remove {name}"
VOCABULARY_LABEL = "Ready vocabularies"
OWN_NAMES = "My own names"
MODEL_LABEL = "Model"
PAPER = "https://arxiv.org/abs/2403.08426"
PAPER_LABEL = "The paper"

NO_PHOTO = "Choose a photo first, or take one of the examples."
NONE_NAMED = "{names} is no class: it allows “none of these”."
NONE_NAMED_MANY = "{names} are no classes: they allow “none of these”."
NO_SUCH_MODEL = "There is no such model; choose one of {names}."
FULL_MISSING = (
    "The full model needs OpenAI’s ViT-B/16 weights and a decoder checkpoint trained for them, and none is here: train one "
    "(README, “The full model”) and start the page with LDVC_FULL=<its folder or Hub id>. Until then, choose lite."
)
FULL_FAILED = "The full model could not be loaded."
NO_SUCH_VOCABULARY = "There is no vocabulary “{name}”; choose one of {names}."
NO_THRESHOLD = "The threshold is a number from 0 to 1, not “{value}”."
NO_FLAG = "Whether “none of these” is allowed is true or false, not “{value}”."
NO_NAMES = "Class names are a text, or a list of texts, not {value}."
FORGOTTEN = "The page keeps your photo no longer. Press Segment; if that does not help, choose the photo anew."
NO_SUCH_FILE = "There is no file of the kind “{name}”; choose one of {names}."
UNEXPECTED = (
    "Something went wrong on our side, and nothing of yours is lost. Try again; if it stays, try another photo."
)

RESULT_EMPTY = "Your photo will appear here, painted by class name."
SEEN = "seen"
UNSEEN = "unseen"
SEEN_AS = "The model saw masks of it under the name “{name}”."
SEEN_HELP = "seen: the model was shown masks of this class. unseen: it knows the name only (striped in the picture)."
NONE_OF_THESE = "none of these"

DOWNLOADS_TITLE = "Download"
DOWNLOADS = {
    "overlay": "Overlay (PNG)",
    "mask": "Mask (indexed PNG)",
    "masks": "Mask per class (ZIP)",
    "data": "Data (JSON)",
}

MAPS_TITLE = "One map per class"
MAPS_LEFT_OUT = "Of this long list, the {shown} classes that cover most are shown."
MAPS_HELP = (
    "How sure the model is that a pixel is that class. Each name has a score of its own; they need not add up to 1."
)

SCALE_LABEL = "One fixed scale from 0 to 1 for all maps"
