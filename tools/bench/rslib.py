"""librs.so by ctypes: what the measurements need of rs.h."""

import array
import ctypes
import os


class SessionParams(ctypes.Structure):
    _fields_ = [("size", ctypes.c_uint32), ("threads", ctypes.c_int32), ("max_batch_tokens", ctypes.c_int32),
                ("allocator", ctypes.c_void_p), ("profile", ctypes.c_bool), ("thread_mode", ctypes.c_int), ("device", ctypes.c_char_p)]


class ModelInfo(ctypes.Structure):
    _fields_ = [("size", ctypes.c_uint32), ("architecture", ctypes.c_char_p), ("name", ctypes.c_char_p),
                ("weight_type", ctypes.c_char_p), ("dim", ctypes.c_int32), ("layers", ctypes.c_int32), ("heads", ctypes.c_int32),
                ("vocab", ctypes.c_int32), ("max_tokens", ctypes.c_int32), ("position_limit", ctypes.c_int32),
                ("parameters", ctypes.c_int64), ("file_bytes", ctypes.c_size_t), ("head", ctypes.c_int), ("labels", ctypes.c_int32),
                ("head_activation", ctypes.c_int), ("text_hidden", ctypes.c_int32), ("image_hidden", ctypes.c_int32),
                ("image_layers", ctypes.c_int32), ("image_width", ctypes.c_int32), ("image_height", ctypes.c_int32),
                ("logit_scale", ctypes.c_float), ("logit_bias", ctypes.c_float)]


class DeviceInfo(ctypes.Structure):
    _fields_ = [("size", ctypes.c_uint32), ("device", ctypes.c_char * 16), ("name", ctypes.c_char * 128),
                ("memory_bytes", ctypes.c_size_t), ("int8_macs", ctypes.c_double), ("f16_macs", ctypes.c_double),
                ("bytes_per_second", ctypes.c_double)]


class Image(ctypes.Structure):
    _fields_ = [("kind", ctypes.c_int), ("data", ctypes.c_void_p), ("length", ctypes.c_size_t), ("width", ctypes.c_int32),
                ("height", ctypes.c_int32)]


class EncodeParams(ctypes.Structure):
    _fields_ = [("size", ctypes.c_uint32), ("pooling", ctypes.c_int), ("normalize", ctypes.c_int), ("max_tokens", ctypes.c_int32),
                ("long_text", ctypes.c_int), ("chunk_overlap", ctypes.c_int32), ("dim", ctypes.c_int32), ("prompt", ctypes.c_char_p),
                ("layer_plus_one", ctypes.c_int32), ("drop", ctypes.c_void_p), ("image_width", ctypes.c_int32),
                ("image_height", ctypes.c_int32)]


IMAGE_PIXELS, POOL_CLS = 2, 2  # of rs_image_kind and rs_pooling


class Text(ctypes.Structure):
    _fields_ = [("data", ctypes.c_char_p), ("length", ctypes.c_size_t)]


class TextInfo(ctypes.Structure):
    _fields_ = [("tokens", ctypes.c_int32), ("total", ctypes.c_int32), ("chunks", ctypes.c_int32), ("truncated", ctypes.c_bool),
                ("kept", ctypes.c_int32)]


def library_path(build):
    for name in ("librs.so", "librs.dylib"):
        path = os.path.join(build, name)
        if os.path.exists(path):
            return path
    raise FileNotFoundError("%s holds no librs.so: build it with 'make', or name its folder with --rs" % build)


def text_array(texts):
    """rs_text[] of a list of str.  The bytes live as long as the array does."""
    data = [t.encode("utf-8") for t in texts]
    out = (Text * len(data))(*[Text(d, len(d)) for d in data])
    out.kept = data
    return out


# The structures of rs.h that these are.
MIRRORED = {"rs_session_params": SessionParams, "rs_model_info": ModelInfo, "rs_device_info": DeviceInfo, "rs_image": Image,
            "rs_encode_params": EncodeParams, "rs_text": Text, "rs_text_info": TextInfo}


def device_info(build, device):
    """What rs says of a device: name and peaks.  RuntimeError that says why where there is none."""
    lib = ctypes.CDLL(library_path(build))
    lib.rs_last_error.restype = ctypes.c_char_p
    info = DeviceInfo(size=ctypes.sizeof(DeviceInfo))
    if lib.rs_device_get_info(device.encode("utf-8"), ctypes.byref(info)) != 0:
        raise RuntimeError(lib.rs_last_error().decode("utf-8", "replace"))
    return {n: v.decode("utf-8", "replace") if isinstance(v, bytes) else v for n, v in ((f[0], getattr(info, f[0])) for f in info._fields_[1:])}


class Rs:
    """A loaded weight file with a session."""

    def __init__(self, build, weights, threads):
        self.lib = ctypes.CDLL(library_path(build))
        for name in ("rs_last_error", "rs_isa", "rs_version", "rs_isa_available"):
            getattr(self.lib, name).restype = ctypes.c_char_p
        self.lib.rs_isa_available.argtypes = [ctypes.c_size_t]
        p, size = ctypes.c_void_p, ctypes.c_size_t
        self.lib.rs_encode.argtypes = [p, p, size, p, p, size, p]
        self.lib.rs_encode_ids.argtypes = [p, p, p, p, size, p, p, size]
        self.lib.rs_tokenize.argtypes = [p, p, p, p, p, p, size, p]
        self.lib.rs_session_threads.argtypes = [p]
        self.lib.rs_session_arena_bytes.argtypes, self.lib.rs_session_arena_bytes.restype = [p], size
        self.lib.rs_drop_parse.argtypes = [ctypes.c_char_p, p]
        self.lib.rs_drop_check.argtypes = [p, p]
        self.lib.rs_encode_images.argtypes = [p, p, size, p, p, size, p]
        self.model, self.session = p(), p()
        self.check(self.lib.rs_model_load(os.fsencode(weights), None, ctypes.byref(self.model)))
        params = SessionParams(size=ctypes.sizeof(SessionParams), threads=threads)
        self.check(self.lib.rs_session_create(self.model, ctypes.byref(params), ctypes.byref(self.session)))
        self.info = ModelInfo(size=ctypes.sizeof(ModelInfo))
        self.check(self.lib.rs_model_get_info(self.model, ctypes.byref(self.info)))

    def check(self, status):
        if status != 0:
            raise RuntimeError("rs: " + self.lib.rs_last_error().decode("utf-8", "replace"))

    def facts(self):
        names = []
        while self.lib.rs_isa_available(len(names)) is not None:
            names.append(self.lib.rs_isa_available(len(names)).decode())
        return {"version": self.lib.rs_version().decode(), "isa": self.lib.rs_isa().decode(), "isas": names,
                "threads": self.lib.rs_session_threads(self.session), "parameters": self.info.parameters}

    def device_bytes(self):
        """Memory of a card: of the session, and of the weights."""
        return self.lib.rs_session_arena_bytes(self.session) + self.info.file_bytes

    def ids_call(self, sequences):
        """A function that encodes these ids and returns an array of [n, dim] floats, which the next call overwrites."""
        starts = [0]
        for s in sequences:
            starts.append(starts[-1] + len(s))
        ids = (ctypes.c_int32 * starts[-1])(*[i for s in sequences for i in s])
        begin = (ctypes.c_size_t * len(starts))(*starts)
        n = len(sequences)
        out = (ctypes.c_float * (n * self.info.dim))()

        def call():
            self.check(self.lib.rs_encode_ids(self.session, ids, None, begin, n, None, out, len(out)))
            return out
        return call

    def with_drop(self, params, drop):
        """Parameters with a schedule of token dropping, as text, or None."""
        if drop:
            schedule = ctypes.c_void_p()
            self.check(self.lib.rs_drop_parse(drop.encode("utf-8"), ctypes.byref(schedule)))
            self.check(self.lib.rs_drop_check(self.model, schedule))
            params.drop = schedule
        return params

    def texts_call(self, texts, batch, drop=None):
        """The same for texts, `batch` at a time; everything from str to vector is in the call."""
        dim = self.info.dim
        params = ctypes.byref(self.with_drop(EncodeParams(size=ctypes.sizeof(EncodeParams)), drop)) if drop else None
        out = (ctypes.c_float * (len(texts) * dim))()

        def call():
            for i in range(0, len(texts), batch):
                part = text_array(texts[i:i + batch])
                self.check(self.lib.rs_encode(self.session, part, len(part), params, ctypes.byref(out, 4 * i * dim),
                                              len(out) - i * dim, None))
            return out
        return call

    def images_call(self, pixels, count, size, batch, drop):
        """The same for f32 pixels [count, 3, size, size] in a writable buffer, `batch` images at a time, with a schedule of token
        dropping or None: class features."""
        params = self.with_drop(EncodeParams(size=ctypes.sizeof(EncodeParams), pooling=POOL_CLS, image_width=size, image_height=size), drop)
        begin, one, dim = ctypes.addressof(ctypes.c_char.from_buffer(pixels)), 12 * size * size, self.info.dim
        if len(pixels) < count * one:
            raise ValueError("%d bytes of pixels, expected at least %d" % (len(pixels), count * one))
        images = (Image * count)(*[Image(IMAGE_PIXELS, begin + i * one, 0, size, size) for i in range(count)])
        images.kept = pixels
        out = (ctypes.c_float * (count * dim))()

        def call():
            for i in range(0, count, batch):
                self.check(self.lib.rs_encode_images(self.session, ctypes.byref(images, i * ctypes.sizeof(Image)), min(batch, count - i),
                                                     ctypes.byref(params), ctypes.byref(out, 4 * i * dim), len(out) - i * dim, None))
            return out
        return call

    def count_tokens(self, texts):
        """Tokens that the texts' vectors are made from, special ones included."""
        total, infos = 0, (TextInfo * 1)()
        out = (ctypes.c_float * self.info.dim)()
        for t in texts:
            self.check(self.lib.rs_encode(self.session, text_array([t]), 1, None, out, len(out), infos))
            total += infos[0].tokens
        return total

    def tokenize(self, text, ids, count):
        """One text to ids (a c_int32 array that is long enough); how many."""
        self.check(self.lib.rs_tokenize(self.model, text, None, ids, None, None, len(ids), ctypes.byref(count)))
        return count.value


def floats(values):
    """The bytes of float32 values: of a ctypes array or of a NumPy array."""
    return bytes(memoryview(values).cast("B")) if not isinstance(values, list) else array.array("f", values).tobytes()
