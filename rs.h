/* rs: a runtime for transformer encoders.
 *
 * This header is the whole public interface and its manual.  It compiles as C99.  There are two levels:
 *
 *   encode   load a weight file, give texts or images, get vectors.  Most programs need only this:
 *
 *              rs_model *model; rs_session *session; rs_text text = {"hello", RS_NUL_TERMINATED}; float v[384];
 *              if (rs_model_load("minilm.rsw", NULL, &model) == RS_OK && rs_session_create(model, NULL, &session) == RS_OK
 *                  && rs_encode(session, &text, 1, NULL, v, 384, NULL) == RS_OK) use(v);
 *              else puts(rs_last_error());
 *
 *   graph    tensors and operators, for those who bring a model of their own.
 *
 * Conventions
 *   - Every call that can fail returns rs_status; rs_last_error() then says what was wrong, in one line.  No call aborts,
 *     exits or throws.
 *   - Shapes are written outermost to innermost, row major.  T: packed tokens of a batch, B: sequences, C: hidden size,
 *     H: heads, D: head size, N and K: output and input features of a linear layer.
 *   - A model is immutable and may be shared by threads.  A session belongs to one thread at a time.
 *   - Pointers must not be NULL unless it says here that they may.  Where a call makes an object, *out is NULL when it fails, and
 *     every rs_…_free takes NULL.
 *   - Strings that go in are UTF-8 and copied where they are kept.  What comes out of a model lives as long as the model.
 *   - Parameter structs begin with `size`: set it to sizeof the struct, zero the rest, and every field keeps its default.
 *     A library newer than the program then knows which fields the program has.  NULL stands for all defaults.
 */
#ifndef RS_H
#define RS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define RS_VERSION "0.1.0"

#if defined(_WIN32)
#define RS_API
#else
#define RS_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* ------------------------------------------------------------------------------------------------ status */

typedef enum rs_status {
  RS_OK = 0,
  RS_ERR_ARGUMENT,    /* a call was made with arguments that make no sense */
  RS_ERR_IO,          /* the operating system refused: open, map, write, rename … */
  RS_ERR_FORMAT,      /* a file is not what it claims to be: truncated, corrupt, foreign, hostile */
  RS_ERR_UNSUPPORTED, /* well formed, but nothing here can run or convert it */
  RS_ERR_LIMIT,       /* too long or too large for the model, the output or a stated limit */
  RS_ERR_MEMORY,      /* an allocation failed */
  RS_ERR_TEXT,        /* a text is not valid UTF-8 */
  RS_ERR_NUMERIC,     /* a result is NaN or infinite */
  RS_ERR_NOT_FOUND,   /* no tensor, key or prompt of that name */
  RS_ERR_IMAGE        /* not an image, a damaged one, or of a kind that is not read */
} rs_status;

/* What the last failed call on this thread found wrong: name, place, got and wanted.  Never NULL; valid until the next call on this
 * thread, and the same after any number of calls that succeed. */
RS_API const char *rs_last_error(void);
RS_API const char *rs_status_name(rs_status status); /* "format error", … */
RS_API const char *rs_version(void);

/* The row of kernels that a session created now has: "amx", "avx2", "scalar" …  Chosen by what the CPU offers; the environment
 * variable RS_ISA, which is read at each call, forces one (and an unknown or unavailable name is an error of rs_session_create). */
RS_API const char *rs_isa(void);
/* Names of all rows in this build that this CPU can run, best first; NULL past the end. */
RS_API const char *rs_isa_available(size_t i);

/* ------------------------------------------------------------------------------------------------ tensor types */

typedef enum rs_type {
  RS_F32 = 0,
  RS_F16 = 1,
  RS_BF16 = 2, /* of weights: read by the converter only */
  RS_I32 = 3,
  RS_W8 = 4, /* 8-bit weights, one f32 scale an output channel (a row) */
  RS_W4 = 5  /* 4-bit weights, an integer scale each 32 along K, one f32 scale an output channel (a row) */
} rs_type;

/* How the elements of a tensor lie in memory. */
typedef enum rs_layout {
  RS_ROWS = 0,  /* row major.  W8, W4: each row of a table with its scales (see docs/design.md) */
  RS_PANELS = 1 /* the weight [N,K] of a linear layer, cut into panels of 16 output channels; inside, 4 along K by 16 along N
                   (K4xN16) for W8 and W4, 1 by 16 for F32 and F16.  K is padded to 32, N to 16, with zeros. */
} rs_layout;

#define RS_MAX_RANK 4

RS_API const char *rs_type_name(rs_type type); /* "f32", "f16", "bf16", "i32", "w8", "w4" */
/* Bytes that a tensor takes in memory and in a file.  Fails on a combination that does not exist and on overflow. */
RS_API rs_status rs_tensor_bytes(rs_type type, rs_layout layout, int rank, const int64_t *shape, size_t *bytes);
/* Encode f32 rows [shape] into `dst` of at least rs_tensor_bytes, and the way back.  Both have places of 4 bytes and more aligned
 * to 4.  Quantizing takes as many threads as a session has by default.  RS_ERR_LIMIT: `dst` is too small; RS_ERR_NUMERIC: NaN,
 * infinity, or a value that the type does not hold. */
RS_API rs_status rs_tensor_encode(rs_type type, rs_layout layout, int rank, const int64_t *shape, const float *src, void *dst,
                                  size_t capacity);
RS_API rs_status rs_tensor_decode(rs_type type, rs_layout layout, int rank, const int64_t *shape, const void *src, float *dst,
                                  size_t capacity_elements);

/* ------------------------------------------------------------------------------------------------ model */

typedef struct rs_model rs_model;

typedef struct rs_load_params {
  uint32_t size;
  bool check_data;    /* verify the checksum of every block of data, not only of header and metadata.  Reads the whole file
                         once, without making it resident. */
  const char *device; /* where its sessions run: "cpu"; "cuda" or "cuda:N": a card of NVIDIA's, by the library librs-cuda.so, which
                         is looked for beside this one; "auto": the first card that answers, else the CPU.  NULL: the environment
                         variable RS_DEVICE, or "cpu".  Weights are copied to a card here, once. */
} rs_load_params;

/* Map a weight file.  The map is used in place: no copy is made, and processes share it.  The file may be moved or deleted
 * while in use; it must not be written to. */
RS_API rs_status rs_model_load(const char *path, const rs_load_params *params, rs_model **out);
RS_API void rs_model_free(rs_model *model); /* after every session of it */
/* Where its sessions run: "cpu", "cuda:0". */
RS_API const char *rs_model_device(const rs_model *model);

typedef struct rs_device_info {
  uint32_t size;
  char device[16];            /* "cpu", "cuda:0" */
  char name[128];             /* of a card: the maker's name, memory, compute capability and driver; of the CPU: rs_isa */
  size_t memory_bytes;        /* of a card's own; 0 of the CPU */
  double int8_macs, f16_macs; /* multiply-accumulates a second at most, by the clocks that a card states; 0: not known */
  double bytes_per_second;    /* of its memory, the same */
} rs_device_info;
/* device: as rs_load_params.device.  Fails where there is none of that name. */
RS_API rs_status rs_device_get_info(const char *device, rs_device_info *out);

/* What a model was trained to say of a text, beside its vectors (rs_classify, rs_answer_question). */
typedef enum rs_head {
  RS_HEAD_NONE = 0,
  RS_HEAD_SEQUENCE, /* labels of a text or a pair of texts: classifiers, cross-encoders */
  RS_HEAD_TOKENS,   /* labels of each token: named entities */
  RS_HEAD_SPANS     /* where an answer begins and ends: two labels of each token */
} rs_head;
/* What makes scores of logits; a caller's business, since rs_classify gives logits. */
typedef enum rs_head_activation {
  RS_HEAD_RAW = 0, /* the logit is the score: a regression, a cross-encoder that ranks */
  RS_HEAD_SOFTMAX, /* one of the labels */
  RS_HEAD_SIGMOID  /* each label for itself */
} rs_head_activation;

/* What the header of the file says of the model. */
typedef struct rs_model_info {
  uint32_t size;
  const char *architecture; /* "bert" */
  const char *name;
  const char *weight_type; /* "q8": the type asked for at conversion */
  int32_t dim;             /* of an embedding: the hidden size C, or of what texts and images are projected to */
  int32_t layers, heads;   /* of what encodes texts; of a model that takes only images, of that */
  int32_t vocab;
  int32_t max_tokens;     /* default limit of a sequence, special tokens included */
  int32_t position_limit; /* what max_tokens may be raised to; of texts */
  int64_t parameters;
  size_t file_bytes;
  rs_head head;
  int32_t labels; /* of the head; 0 without one */
  rs_head_activation head_activation;
  int32_t text_hidden;               /* hidden size C of what encodes texts; 0: the model takes none */
  int32_t image_hidden;              /* the same of images */
  int32_t image_layers;              /* drop schedules are for these, where there are any */
  int32_t image_width, image_height; /* of the images that it takes, unless asked otherwise */
  float logit_scale, logit_bias;     /* of models that compare texts and images: logit = cosine * scale + bias; 0 of others */
} rs_model_info;
/* `info->size` must be set by the caller. */
RS_API rs_status rs_model_get_info(const rs_model *model, rs_model_info *info);
/* The name of a label of the head ("positive"), or NULL. */
RS_API const char *rs_model_label(const rs_model *model, int32_t label);
RS_API const char *rs_head_name(rs_head head);                      /* "none", "sequence", "tokens", "spans" */
RS_API const char *rs_head_activation_name(rs_head_activation how); /* "none", "softmax", "sigmoid" */

/* Metadata: sorted keys, typed values.  docs/design.md lists the keys. */
typedef enum rs_meta_kind {
  RS_META_BOOL = 0,
  RS_META_I64,
  RS_META_F64,
  RS_META_STR,
  RS_META_I64S,
  RS_META_F32S,
  RS_META_STRS
} rs_meta_kind;

typedef struct rs_meta {
  const char *key; /* NUL terminated */
  rs_meta_kind kind;
  size_t count; /* elements of an array; bytes of a string; 1 otherwise */
  bool boolean;
  int64_t i64;
  double f64;
  const char *str; /* NUL terminated; may hold NUL bytes within `count` */
  const int64_t *i64s;
  const float *f32s;
  const void *strs; /* read by rs_meta_string */
} rs_meta;

RS_API size_t rs_model_meta_count(const rs_model *model);
RS_API rs_status rs_model_meta_at(const rs_model *model, size_t i, rs_meta *out);
RS_API rs_status rs_model_meta(const rs_model *model, const char *key, rs_meta *out); /* RS_ERR_NOT_FOUND when absent */
/* Element i of an RS_META_STRS value: NUL terminated, *length bytes (length may be NULL). */
RS_API const char *rs_meta_string(const rs_meta *meta, size_t i, size_t *length);

typedef struct rs_tensor_info {
  const char *name;
  rs_type type;
  rs_layout layout;
  int rank;
  int64_t shape[RS_MAX_RANK];
  const void *data;
  size_t bytes;
  uint64_t offset; /* of the data in the file */
} rs_tensor_info;

RS_API size_t rs_model_tensor_count(const rs_model *model);
RS_API rs_status rs_model_tensor_at(const rs_model *model, size_t i, rs_tensor_info *out); /* sorted by name */
RS_API rs_status rs_model_tensor(const rs_model *model, const char *name, rs_tensor_info *out);

/* Check block checksums and what no load looks at: integer ranges, no NaN in any weight.  Reads every byte. */
RS_API rs_status rs_model_verify(const rs_model *model);

/* ------------------------------------------------------------------------------------------------ session, texts */

typedef struct rs_session rs_session;

/* Where the activations of a session live, and nothing else of it.  The struct is copied; both are called on threads that call the
 * session, never on others.  alloc returns memory aligned to `align` (a power of two, at least 64), or NULL. */
typedef struct rs_allocator {
  void *(*alloc)(void *ctx, size_t bytes, size_t align);
  void (*free)(void *ctx, void *memory, size_t bytes);
  void *ctx;
} rs_allocator;

/* How the threads of a session share the work of rs_encode.  It never changes a result. */
typedef enum rs_thread_mode {
  RS_THREADS_AUTO = 0,  /* throughput where a batch can be cut into even parts that keep to max_batch_tokens, else latency */
  RS_THREADS_LATENCY,   /* all threads on one part of the batch: a single text takes the shortest time */
  RS_THREADS_THROUGHPUT /* each thread takes parts of its own, of at most max_batch_tokens / threads tokens (or one sequence), and
                           waits for no one: most texts a second */
} rs_thread_mode;

typedef struct rs_session_params {
  uint32_t size;
  int32_t threads; /* at most 1024; 0: OMP_NUM_THREADS where set, else the CPUs that affinity and cgroup limits leave to the
                      process.  A run has fewer where the system gives fewer, and in a child after fork() it has one on a thread
                      that had several before */
  int32_t max_batch_tokens; /* larger batches are run in parts of at most this many tokens (or one sequence); 0: 1024.  It bounds
                         memory, never changes a result. */
  const rs_allocator *allocator; /* NULL: the C library's */
  bool profile;                  /* time every operator: rs_session_profile_at.  Threads are then in latency mode */
  rs_thread_mode thread_mode;
  const char *device; /* of a session without a model: as rs_load_params.device; of one with a model, NULL or where that is.  On a
                         card, max_batch_tokens is 32768 by default, threads are those that lay out the pixels of images, and
                         thread_mode is of no meaning */
} rs_session_params;

/* model may be NULL for a session that runs graphs without a weight file. */
RS_API rs_status rs_session_create(const rs_model *model, const rs_session_params *params, rs_session **out);
RS_API void rs_session_free(rs_session *session);
RS_API int32_t rs_session_threads(const rs_session *session);
RS_API size_t rs_session_arena_bytes(const rs_session *session); /* activations and scratch, the most so far */

typedef struct rs_text {
  const char *data; /* UTF-8 */
  size_t length;    /* bytes, or RS_NUL_TERMINATED */
} rs_text;
#define RS_NUL_TERMINATED SIZE_MAX

typedef struct rs_span {
  uint32_t begin, end; /* bytes of the original text (of the pair where type_ids says so); both 0 for a special token */
} rs_span;

typedef enum rs_pooling {
  RS_POOL_DEFAULT = 0, /* the model's own */
  RS_POOL_MEAN,
  RS_POOL_CLS,
  RS_POOL_MAX,
  RS_POOL_MEAN_SQRT_LEN, /* sum / sqrt(n) */
  RS_POOL_WEIGHTED_MEAN, /* weights 1, 2, … n */
  RS_POOL_LAST,
  RS_POOL_NONE /* no pooling: a vector for every token */
} rs_pooling;
RS_API const char *rs_pooling_name(rs_pooling pooling); /* "mean", "cls", "max", "mean_sqrt_len", "weighted_mean", "last", "none" */
RS_API rs_status rs_pooling_parse(const char *name, rs_pooling *out);

typedef enum rs_long_text {
  RS_LONG_TRUNCATE = 0, /* keep the first tokens; rs_text_info says so */
  RS_LONG_ERROR,
  RS_LONG_CHUNK /* overlapping windows, each encoded for itself; the mean of their vectors weighted by their tokens */
} rs_long_text;

typedef enum rs_tristate { RS_DEFAULT = 0, RS_ON = 1, RS_OFF = -1 } rs_tristate;

/* Token dropping: after chosen layers, the tokens that matter least leave, so that the layers behind them have less to do.  The
 * score is how much a layer changes a token (Representation Shift: arXiv 2508.00367), or one of the others below; how well a score
 * does, and its sign, belong to the model: rs tune finds out on data.  How many tokens stay depends on lengths only.  What stays is
 * in order; of equal scores, the earlier token stays. */
typedef enum rs_drop_mode {
  RS_DROP_PRUNE = 0, /* dropped tokens are gone: pooling takes what is left */
  RS_DROP_RESTORE,   /* at the end, every dropped token is back at its place with the last state that it had */
  RS_DROP_MERGE,     /* each dropped token is averaged into the kept one that it is most like (cosine), weighted by how many tokens
                        each stands for; attention counts a token that often, and so does a mean (ToMe: arXiv 2210.09461) */
  RS_DROP_FOLD       /* the dropped tokens of a sequence become one more token at its end, weighted by score (EViT: arXiv
                        2202.07800); counted as RS_DROP_MERGE does */
} rs_drop_mode;
/* Tokens that never leave.  RS_PROTECT_PREFIX: of a pair, the first text and the special tokens around it (a question, a query); of
 * rs_encode_ids, what comes before the first type id that is not 0; of a single text, the first token. */
typedef enum rs_drop_protect {
  RS_PROTECT_CLS = 0, /* the first of a sequence */
  RS_PROTECT_SPECIAL, /* those of the tokenizer's template: [CLS], [SEP] */
  RS_PROTECT_NONE,
  RS_PROTECT_PREFIX
} rs_drop_protect;

/* A schedule.  Either ratios or keeps, one a layer; layers that they do not reach drop nothing, more than the model has are an
 * error.  What the pointers point to need not outlive the call that it is given to.
 *
 * score: what is kept are the tokens where it is highest.  A sum of terms, "-mlp" or "norm-0.5mlp:cos"; several terms are each
 * brought to mean 0 and deviation 1 over the sequence first.  One score for all layers, or one a layer with commas between.  Terms:
 *   mlp, attention       the L2 norm of what that half of the layer adds (the paper's score: "mlp")
 *   block                the norm of the difference that the whole layer makes
 *   mlp:out, attention:out   the norm of F(x) - x, where F is that half with its residual and, in post-norm models, its norm
 *   mlp:bare, attention:bare the same where F is the half alone, without residual
 *   :l1, :cos            another distance than :l2: sum of magnitudes, or 1 - cosine of before and after
 *   norm                 the norm of the state;  centre: its distance from the mean of the sequence's states
 *   attn-colsum          the attention that a token gets, mean of heads and queries;  attn-cls: from the first token only
 *   random, first        no score at all: by chance (rs_drop.seed), or by position */
typedef struct rs_drop {
  uint32_t size;
  const double *ratios; /* of n tokens keep n - floor(n * ratio); 0 <= ratio < 1 */
  size_t n_ratios;
  const int32_t *keeps; /* or: keep so many, protected tokens among them; 0: all */
  size_t n_keeps;
  const char *score; /* NULL: "mlp" */
  rs_drop_mode mode;
  rs_drop_protect protect;
  int32_t least; /* never cut a sequence below so many tokens: shorter ones stay as they are */
  uint64_t seed;
} rs_drop;

/* As text, as weight files keep it: "ratios=0,0.3,0,0.3 score=-mlp mode=merge protect=cls min=16 seed=0".  rs_drop_parse takes the
 * words in any order, each once, and leaves defaults where one is missing.  A schedule that no model could run has no text. */
RS_API rs_status rs_drop_format(const rs_drop *drop, char *text, size_t capacity);
RS_API rs_status rs_drop_parse(const char *text, rs_drop **out);
RS_API void rs_drop_free(rs_drop *drop);
/* Is this a schedule that the model can run?  An error says why not. */
RS_API rs_status rs_drop_check(const rs_model *model, const rs_drop *drop);
/* A schedule stored in the file under that name, and what was measured with it ("" where nothing is noted).  They live as long as
 * the model. */
RS_API rs_status rs_model_drop(const rs_model *model, const char *name, const rs_drop **drop, const char **note);
/* What is known to go wrong with such a schedule in models of this family, with a measured loss; NULL when nothing is. */
RS_API const char *rs_drop_warning(const rs_model *model, const rs_drop *drop);
/* Tokens that enter each layer, and that are left at the end, of a sequence of `tokens`, `protect` of which may not leave (1 with
 * RS_PROTECT_CLS).  counts: [layers + 1], of images [image_layers + 1].  The extra token of RS_DROP_FOLD counts. */
RS_API rs_status rs_drop_counts(const rs_model *model, const rs_drop *drop, int32_t tokens, int32_t protect, int32_t *counts);

typedef struct rs_encode_params {
  uint32_t size;
  rs_pooling pooling;
  rs_tristate normalize;  /* divide by the L2 norm; default: the model's own */
  int32_t max_tokens;     /* of a sequence, special tokens included; 0: the model's own; at most its position limit */
  rs_long_text long_text; /* what to do with a text that has more */
  int32_t chunk_overlap;  /* tokens that two windows share; 0: an eighth of a window; -1: none */
  int32_t dim;            /* keep the first dim values and normalise again (Matryoshka); 0: all */
  const char *prompt;     /* put in front of every text as it is; NULL: the model's default prompt; "": none */
  int32_t layer_plus_one; /* 0: the last layer; k + 1: the states after layer k, 0 being the embeddings (pooled all the same) */
  const rs_drop *drop;    /* token dropping; NULL: none */
  int32_t image_width, image_height; /* pixels that images are brought to; 0: the model's own.  Both or none */
} rs_encode_params;

typedef struct rs_text_info {
  int32_t tokens; /* that the vector was made from, special tokens included (with chunks: the whole text once) */
  int32_t total;  /* that the text has, special tokens included */
  int32_t chunks; /* 1 unless RS_LONG_CHUNK cut it */
  bool truncated; /* tokens < total */
  int32_t kept;   /* tokens that the last layer leaves; == tokens unless some were dropped for good.  With chunks: of all windows
                     together, so that special tokens and what two windows share count in each */
} rs_text_info;

/* n texts to n vectors.
 * dim: rs_model_info.dim; of models that compare texts with images, text_hidden where a pooling or an earlier layer is named.
 * out: [n, dim] f32, or with RS_POOL_NONE [sum of kept, dim] in the order of the texts; capacity in floats.  infos: [n] or NULL.
 * The result for a text does not depend, in any bit, on the other texts, their order or the number of threads.
 * On failure `out` is unspecified; rs_encode_failed tells which text was at fault. */
RS_API rs_status rs_encode(rs_session *session, const rs_text *texts, size_t n, const rs_encode_params *params, float *out,
                           size_t capacity, rs_text_info *infos);
/* The index of the text or image that made the last rs_encode, rs_encode_ids, rs_encode_images, rs_classify, rs_classify_images,
 * rs_answer_question or rs_calibrate of this session fail, or SIZE_MAX if it was not one's fault.  Other calls leave it alone. */
RS_API size_t rs_encode_failed(const rs_session *session);

/* ---- images: packed, encoded, dropped from as texts are */

typedef enum rs_image_kind {
  RS_IMAGE_FILE = 0, /* the bytes of a JPEG, PNG, BMP, GIF (its first frame) or PNM (P5, P6) file of at most 100,000,000 pixels */
  RS_IMAGE_RGB,      /* u8 [height, width, 3] */
  RS_IMAGE_PIXELS    /* f32 [3, height, width], finite, as rs_image_prepare makes it */
} rs_image_kind;
typedef struct rs_image {
  rs_image_kind kind;
  const void *data;
  size_t length;         /* bytes, of RS_IMAGE_FILE */
  int32_t width, height; /* of the others */
} rs_image;

/* What a model makes of an image of that size (0, 0: the size that it wants); at most 16384 a side. */
typedef struct rs_image_shape {
  int32_t width, height; /* pixels */
  int32_t columns, rows; /* patches; pixels that do not fill one are left out at the right and the bottom */
  int32_t prefix;        /* tokens before the patches: class, distillation, registers.  They are never dropped */
  int32_t tokens;        /* prefix + columns * rows */
} rs_image_shape;
RS_API rs_status rs_image_get_shape(const rs_model *model, int32_t width, int32_t height, rs_image_shape *out);

/* Decode (file), turn as EXIF says, resize, crop and normalise as the model's own processor does it, to f32 [3, height, width] of
 * that size (0, 0: the model's own): what rs_encode_images does to RS_IMAGE_FILE and RS_IMAGE_RGB, for programs that have threads
 * of their own for it.  Any number of threads may.  capacity: in floats.  source_size: receives width and height of the decoded
 * image, or NULL. */
RS_API rs_status rs_image_prepare(const rs_model *model, const rs_image *image, int32_t width, int32_t height, float *pixels,
                                  size_t capacity, int32_t source_size[2]);

typedef struct rs_image_info {
  int32_t width, height; /* of the decoded image; of pixels, as given */
  int32_t tokens;        /* that were encoded, those before the patches included */
  int32_t kept;          /* that the last layer leaves */
} rs_image_info;
/* n images to n vectors, as rs_encode.  Pooling: by default the model's own (of models that compare images with texts, projected to
 * their common space); RS_POOL_CLS is the state of the first token, RS_POOL_MEAN and RS_POOL_MAX are of the patches,
 * RS_POOL_NONE a vector for every token, those before the patches included.  out: [n, dim] or [sum of kept, dim], where dim is
 * rs_model_info.dim, or image_hidden where a pooling or an earlier layer is named.  infos: [n] or NULL.  params: what is for texts
 * does not count: max_tokens, long_text, chunk_overlap and prompt. */
RS_API rs_status rs_encode_images(rs_session *session, const rs_image *images, size_t n, const rs_encode_params *params, float *out,
                                  size_t capacity, rs_image_info *infos);
/* What the head of the model says of n images: logits [n, labels], as rs_classify. */
RS_API rs_status rs_classify_images(rs_session *session, const rs_image *images, size_t n, const rs_encode_params *params,
                                    float *logits, size_t capacity, rs_image_info *infos);

/* rs_encode from token ids, special tokens included: sequence i is ids[starts[i] .. starts[i + 1]); starts: [n + 1].
 * type_ids: as ids, or NULL for zeros.  params: pooling, normalize, dim, layer_plus_one and drop count; with a drop, RS_POOL_NONE
 * gives the rows that rs_drop_counts says are left. */
RS_API rs_status rs_encode_ids(rs_session *session, const int32_t *ids, const int32_t *type_ids, const size_t *starts, size_t n,
                               const rs_encode_params *params, float *out, size_t capacity);

/* What it takes to run n sequences of those lengths together, layer by layer, without running them.  layers: [model layers + 1], of
 * a model that takes images [image_layers + 1]; the last for what comes behind them (pooling).  With RS_PROTECT_PREFIX, the first
 * token counts as protected.  A model that takes images is asked about these: each length is what rs_image_get_shape says of the
 * size in params. */
typedef struct rs_plan_layer {
  int64_t tokens; /* that enter */
  size_t bytes;   /* of activations in the arena, at most, while the layer runs */
  double macs;    /* multiply-accumulates */
} rs_plan_layer;
RS_API rs_status rs_plan(rs_session *session, const int32_t *lengths, size_t n, const rs_encode_params *params,
                         rs_plan_layer *layers, size_t *arena_bytes);

/* Which tokens of a text leave where, under params->drop (with RS_LONG_CHUNK an error).  Everything lives until rs_trace_free. */
typedef struct rs_trace rs_trace;
typedef struct rs_trace_step { /* a layer that drops */
  int32_t layer;               /* the tokens leave behind it; from 0 */
  int32_t n, kept_count;       /* tokens before, and tokens of these that stay */
  const int32_t *positions;    /* [n] in the sequence, special tokens counted; -1: an extra token of RS_DROP_FOLD */
  const float *scores;         /* [n] */
  const uint8_t *kept;         /* [n] 1: stays */
  const int32_t *into;         /* [n] with RS_DROP_MERGE the position of the token that it becomes part of, its own where it stays;
                                  else NULL */
} rs_trace_step;
RS_API rs_status rs_trace_text(rs_session *session, const rs_text *text, const rs_text *pair, const rs_encode_params *params,
                               rs_trace **out);
/* The same of an image: tokens have neither ids nor spans, their order is that of rs_image_shape. */
RS_API rs_status rs_trace_image(rs_session *session, const rs_image *image, const rs_encode_params *params, rs_trace **out);
RS_API void rs_trace_free(rs_trace *trace);
/* The sequence as the model gets it, a prompt included: returns how many tokens.  spans: bytes of the prompt and text, or of the
 * pair from rs_trace_pair on.  Any of the pointers may be NULL. */
RS_API size_t rs_trace_tokens(const rs_trace *trace, const int32_t **ids, const int32_t **type_ids, const rs_span **spans);
RS_API size_t rs_trace_pair(const rs_trace *trace); /* the first token of the pair; without one, how many tokens there are */
RS_API size_t rs_trace_steps(const rs_trace *trace);
RS_API rs_status rs_trace_step_at(const rs_trace *trace, size_t i, rs_trace_step *out);
RS_API size_t rs_trace_kept(const rs_trace *trace, const int32_t **positions); /* at the end; returns how many */

/* What the head of the model says of n texts, or of n pairs of texts where `pairs` is not NULL.
 * logits: [n, labels] with RS_HEAD_SEQUENCE, else [sum of tokens, labels] in the order of the texts, special tokens included;
 * capacity in floats.  infos: [n] or NULL.  params: max_tokens and long_text count, and prompt where it is given; RS_LONG_CHUNK is
 * for single texts and RS_HEAD_SEQUENCE, and gives the mean of the windows' logits weighted by their tokens.  A pair that is too
 * long is cut as the tokenizers library does it for truncation=True: the longer text first (rs_cut_pair).  Under params->drop,
 * heads of tokens get the states of RS_DROP_RESTORE whatever the mode.  As for rs_encode: a result does not depend on the others,
 * and rs_encode_failed tells which text was at fault. */
RS_API rs_status rs_classify(rs_session *session, const rs_text *texts, const rs_text *pairs, size_t n,
                             const rs_encode_params *params, float *logits, size_t capacity, rs_text_info *infos);
/* Lengths in tokens that two texts are cut to so that together they have at most `room`. */
RS_API void rs_cut_pair(size_t *text, size_t *pair, size_t room);

typedef struct rs_answer_params {
  uint32_t size;
  int32_t max_tokens; /* of a window: question, special tokens and its part of the context; 0: the model's own, at most 384 */
  int32_t overlap;    /* tokens of the context that two windows share ("doc_stride" of transformers); 0: 128, at most half
                         of what a window has room for; -1: none */
  int32_t max_answer_tokens; /* 0: 30 */
  rs_tristate whole_words;   /* an answer that begins or ends inside a word gets all of it; default: on */
  const rs_drop *drop;       /* token dropping, with RS_DROP_RESTORE whatever its mode says; NULL: none */
} rs_answer_params;

typedef struct rs_answer {
  float logit;           /* logit of the start + logit of the end: what answers are ranked by, and comparable between windows */
  float score;           /* the product of their softmaxes over the context and the first token of the window */
  size_t begin, end;     /* bytes of the context */
  float no_answer_logit; /* the same of the first token ([CLS]), which stands for "no answer": the least of all windows; */
  float no_answer_score; /* equal for all answers to a question, as are: */
  int32_t windows;       /* that the context was cut into */
  int32_t tokens;        /* of all windows together: question, special tokens and context in each */
} rs_answer;

/* The best spans of `context` that answer `question`, best first: *n of them, at most `capacity`; none where the context has no
 * token.  The logits are those of the SQuAD script of transformers, where there is no answer if no_answer_logit - logit is more
 * than a threshold; the scores are those of its question-answering pipeline.  A span lies in the context, in one window.  Of spans
 * that come to the same bytes the best counts.  A long context goes in windows that overlap; a question that leaves no room for it
 * is an error (RS_ERR_LIMIT).  Where there is no span, answers[0] still has what is equal for all answers.  rs_encode_failed: 0
 * where the question is at fault, 1 where the context is. */
RS_API rs_status rs_answer_question(rs_session *session, const rs_text *question, const rs_text *context,
                                    const rs_answer_params *params, rs_answer *answers, size_t capacity, size_t *n);

/* A stored prompt by its name ("query", "passage" …): rs_encode_params.prompt takes the text. */
RS_API rs_status rs_model_prompt(const rs_model *model, const char *name, const char **text);

/* Tokenize without cutting.  pair may be NULL.  Any of ids, type_ids, spans may be NULL; each holds `capacity` elements.
 * *n receives the number of tokens even when it is more than `capacity` (then RS_ERR_LIMIT). */
RS_API rs_status rs_tokenize(const rs_model *model, const rs_text *text, const rs_text *pair, int32_t *ids, int32_t *type_ids,
                             rs_span *spans, size_t capacity, size_t *n);
/* The token with that id as the vocabulary writes it, or NULL. */
RS_API const char *rs_token(const rs_model *model, int32_t id);

/* Time spent an operator since the session began (rs_session_params.profile). */
typedef struct rs_profile_row {
  const char *name; /* of the tensor that it makes: "blk.0.attn.qkv" */
  const char *op;   /* "linear" */
  uint64_t calls;
  double seconds;
  double macs;  /* multiply-accumulates */
  rs_type type; /* whose arithmetic they are: of the weight of a linear layer; attention and token_assign may have RS_BF16 or RS_W8;
                   RS_F32 of all else */
} rs_profile_row;
RS_API size_t rs_session_profile_count(const rs_session *session);
RS_API rs_status rs_session_profile_at(const rs_session *session, size_t i, rs_profile_row *out);

/* What `macs / seconds` of a profile row can be at most: the multiply-accumulates a second that `threads` threads (0: as a session
 * has by default) reach together with the kernels of rs_isa() and weights of that type (RS_F32, RS_F16, RS_W8 or RS_W4), when the
 * instructions that the products need are all they do.  Nothing is loaded, quantized or unpacked.  For F16, that is the peak of
 * F32, since the halves are widened and multiplied as floats.  RS_BF16 is for attention of quantized models, where the kernels have
 * something faster than f32 for it, else the same as F32.  The scalar row, whose instructions the compiler chooses, is
 * measured on small blocks in the first cache.  Takes some tens of milliseconds and adds up the best of many
 * short bursts of each thread, so that what else runs matters little; of more threads than there are CPUs, only as many count. */
RS_API rs_status rs_measure_peak(rs_type type, int32_t threads, double *macs_per_second);

/* ------------------------------------------------------------------------------------------------ graph */

typedef struct rs_graph rs_graph;
typedef struct rs_tensor rs_tensor; /* owned by its graph */

/* Dimensions that are known only at run time.  RS_DIM_TOKENS of a tensor behind rs_token_drop are fewer tokens than before it, and
 * operators that take several tensors want them of one such level, unless they say otherwise. */
#define RS_DIM_TOKENS (-1)     /* T */
#define RS_DIM_SEQUENCES (-2)  /* B */
#define RS_DIM_CU_SEQLENS (-3) /* B + 1 */

/* Building: each rs_<op> adds an operator and returns its result.  A call that fails returns NULL and the graph remembers the
 * first error; calls given NULL for a tensor that they need pass it on.  So build everything, then ask rs_graph_finish once.
 * Weights come from `model` (may be NULL when the graph uses rs_constant only), which must outlive the graph. */
RS_API rs_status rs_graph_create(const rs_model *model, rs_graph **out);
RS_API void rs_graph_free(rs_graph *graph);
/* Validate.  From here on the graph is immutable: builders fail, and change nothing. */
RS_API rs_status rs_graph_finish(rs_graph *graph);

/* Another tensor of that name is an error, as it is of rs_name. */
RS_API rs_tensor *rs_input(rs_graph *g, const char *name, rs_type type, int rank, const int64_t *shape);
/* A tensor of the model.  The shape is what the caller needs; another one in the file is an error that names both. */
RS_API rs_tensor *rs_weight(rs_graph *g, const char *name, int rank, const int64_t *shape);
/* Memory of the caller's that outlives the graph; 64-byte aligned, encoded as rs_tensor_encode does. */
RS_API rs_tensor *rs_constant(rs_graph *g, const char *name, rs_type type, rs_layout layout, int rank, const int64_t *shape,
                              const void *data);
RS_API rs_tensor *rs_output(rs_graph *g, rs_tensor *x);                 /* keep x until the run ends; returns x */
RS_API rs_tensor *rs_name(rs_graph *g, rs_tensor *x, const char *name); /* for errors, profiles, rs_graph_tensor; returns x */
RS_API rs_tensor *rs_graph_tensor(const rs_graph *g, const char *name); /* NULL when there is none */

typedef enum rs_activation {
  RS_ACT_NONE = 0,
  RS_ACT_GELU,      /* x/2 (1 + erf(x / sqrt 2)) */
  RS_ACT_GELU_TANH, /* the tanh approximation: gelu_new, gelu_pytorch_tanh */
  RS_ACT_RELU,
  RS_ACT_SILU,
  RS_ACT_TANH,
  RS_ACT_QUICK_GELU /* x sigmoid(1.702 x) */
} rs_activation;

/* Rows of a table: ids [T] i32, table [V, C] -> [T, C].  An id outside of the table fails the run. */
RS_API rs_tensor *rs_embed(rs_graph *g, rs_tensor *ids, rs_tensor *table);
/* a + b, both [T, C]. */
RS_API rs_tensor *rs_add(rs_graph *g, rs_tensor *a, rs_tensor *b);
/* act(x w^T + bias).  x: [.., K]; w: [N, K] in panels; bias: [N] or NULL -> [.., N].  W8 and W4 quantize x to 8 bits a row, times
 * "<w>.input_scale" [K] where the file has that beside w; what they come to before the activation is bit-identical on every ISA. */
RS_API rs_tensor *rs_linear(rs_graph *g, rs_tensor *x, rs_tensor *w, rs_tensor *bias, rs_activation act);
/* gamma (v - mean(v)) / sqrt(var(v) + eps) + beta over C, with v = x + residual (residual may be NULL).  x: [T, C]. */
RS_API rs_tensor *rs_layer_norm(rs_graph *g, rs_tensor *x, rs_tensor *residual, rs_tensor *gamma, rs_tensor *beta, float eps);
/* Columns [first, first + count) of x [T, C'] as a view: no copy. */
RS_API rs_tensor *rs_columns(rs_graph *g, rs_tensor *x, int64_t first, int64_t count);
/* softmax(q k^T * scale + log sizes) v for each sequence and head, never an [n, n] tensor (Dao et al., arXiv 2205.14135; online
 * softmax, arXiv 1805.02867).  q, k, v: [T, H*D]; cu_seqlens: [B + 1] i32: sequence b is rows cu_seqlens[b] .. cu_seqlens[b + 1];
 * sizes: [T, 1] how many tokens each key stands for (proportional attention: arXiv 2210.09461), or NULL: one. */
RS_API rs_tensor *rs_flash_attn(rs_graph *g, rs_tensor *q, rs_tensor *k, rs_tensor *v, rs_tensor *cu_seqlens, rs_tensor *sizes,
                                int heads, float scale);
/* The same where a query sees keys up to its own place only. */
RS_API rs_tensor *rs_flash_attn_causal(rs_graph *g, rs_tensor *q, rs_tensor *k, rs_tensor *v, rs_tensor *cu_seqlens,
                                       rs_tensor *sizes, int heads, float scale);
/* The same where a query sees keys at most `window` >= 1 places from its own, on either side (sliding window: arXiv 2004.05150).
 * Time falls with the window.  Behind a drop, places are those among the tokens that are left. */
RS_API rs_tensor *rs_flash_attn_window(rs_graph *g, rs_tensor *q, rs_tensor *k, rs_tensor *v, rs_tensor *cu_seqlens,
                                       rs_tensor *sizes, int heads, float scale, int window);
/* Rotary position embedding (RoPE: arXiv 2104.09864).  The table: cos, then sin, of f32(position) * frequency, itself rounded to
 * f32: positions [T] i32; frequencies [F], a weight: theta^(-2i / D) as a rule -> [T, 2F].  A row is of a token: tokens that a drop
 * leaves are rotated by the rows that rs_token_gather takes. */
RS_API rs_tensor *rs_rope_table(rs_graph *g, rs_tensor *positions, rs_tensor *frequencies);
/* Each head's column i < F and column F + i, (a, b), become (a cos - b sin, b cos + a sin); columns from 2F on stay.  x: [T, H*D],
 * D >= 2F; table: [T, 2F]. */
RS_API rs_tensor *rs_rope(rs_graph *g, rs_tensor *x, rs_tensor *table, int heads);
/* Attention of one query, the same for every sequence: query [H*D], a weight; k, v: [T, H*D] -> [B, H*D].  An empty sequence gives
 * zeros. */
RS_API rs_tensor *rs_attn_pool(rs_graph *g, rs_tensor *query, rs_tensor *k, rs_tensor *v, rs_tensor *cu_seqlens, rs_tensor *sizes,
                               int heads, float scale);
/* act(x[:, :F]) x[:, F:] for x [.., 2F] -> [.., F] (GLU variants: arXiv 2002.05202). */
RS_API rs_tensor *rs_gate(rs_graph *g, rs_tensor *x, rs_activation act);
/* One vector a sequence: x [T, C], cu_seqlens [B + 1] -> [B, C], of all tokens but the first `skip`.  Where none is left: zeros.
 * sizes: [T, 1] weights of the tokens in RS_POOL_MEAN and RS_POOL_MEAN_SQRT_LEN, or NULL. */
RS_API rs_tensor *rs_pool(rs_graph *g, rs_tensor *x, rs_tensor *cu_seqlens, rs_tensor *sizes, rs_pooling pooling, int skip);
/* Each row divided by its L2 norm (a row of zeros stays). */
RS_API rs_tensor *rs_l2_normalize(rs_graph *g, rs_tensor *x);

/* ---- token dropping: a score, [T, 1]; what it keeps; and the states of those tokens */

typedef enum rs_distance { RS_DISTANCE_L2 = 0, RS_DISTANCE_L1, RS_DISTANCE_COS } rs_distance; /* COS: 1 - cosine */
/* How far each row moved: the distance of `to` from `from`, both [T, C] -> [T, 1].  from NULL: from 0 (L2, L1). */
RS_API rs_tensor *rs_shift(rs_graph *g, rs_tensor *to, rs_tensor *from, rs_distance distance);
/* Distance of each row from the mean row of its sequence: [T, C] -> [T, 1]. */
RS_API rs_tensor *rs_centre_distance(rs_graph *g, rs_tensor *x, rs_tensor *cu_seqlens);
/* Column sums of the attention matrix, mean of heads and queries: what attention each key gets (of the first query only, where
 * class_only).  One more pass over q k^T, in blocks of queries.  q, k: [T, H*D]; sizes as for rs_flash_attn -> [T, 1]. */
RS_API rs_tensor *rs_attn_colsum(rs_graph *g, rs_tensor *q, rs_tensor *k, rs_tensor *cu_seqlens, rs_tensor *sizes, int heads,
                                 float scale, bool class_only);
/* The same of rs_flash_attn_window.  class_only: a key that the first query does not see has 0. */
RS_API rs_tensor *rs_attn_colsum_window(rs_graph *g, rs_tensor *q, rs_tensor *k, rs_tensor *cu_seqlens, rs_tensor *sizes, int heads,
                                        float scale, bool class_only, int window);
/* A score by position alone: -i, or a random number that depends on seed, i and the length. */
RS_API rs_tensor *rs_position_score(rs_graph *g, rs_tensor *cu_seqlens, bool random, uint64_t seed);
/* weight (x - mean) / deviation over each sequence (0 where all are equal): x [T, 1] -> [T, 1]. */
RS_API rs_tensor *rs_standardize(rs_graph *g, rs_tensor *x, rs_tensor *cu_seqlens, float weight);

typedef struct rs_drop_rule { /* as the fields of rs_drop */
  double ratio;
  int32_t keep; /* instead of ratio, where it is not 0 */
  int32_t least;
  bool lowest;     /* keep where the score is lowest */
  bool keep_first; /* the first token of a sequence stays */
  bool fold;       /* where tokens are dropped, one more stands at the end */
} rs_drop_rule;
/* Which tokens stay: score [T, 1] -> [T', 2] i32: the row that it is of score, and of the graph's inputs; both -1 for an extra
 * token. protect: an input [T] i32 of the graph: not 0 for tokens that never leave, or NULL.  A NaN among the scores of a sequence
 * of which tokens leave fails the run. */
RS_API rs_tensor *rs_token_drop(rs_graph *g, rs_tensor *score, rs_tensor *cu_seqlens, rs_tensor *protect, const rs_drop_rule *rule);
/* cu_seqlens of the tokens that stay: [B + 1] i32.  No operator: it is known when a run is planned. */
RS_API rs_tensor *rs_token_starts(rs_graph *g, rs_tensor *kept);
/* Their rows of x [T, C] -> [T', C].  Not where the rule folds. */
RS_API rs_tensor *rs_token_gather(rs_graph *g, rs_tensor *x, rs_tensor *kept);
/* The way back: rows of before [T, C], but for tokens that stayed, which have theirs of x [T', C] -> [T, C]. */
RS_API rs_tensor *rs_token_restore(rs_graph *g, rs_tensor *x, rs_tensor *before, rs_tensor *kept);
/* The row, of those that stay, that each token becomes part of: its own; for a dropped one the extra token's where the rule folds,
 * else that of the token most like it, by the cosine of rows of x [T, C] -> [T, 1] i32.  On a CPU, where x comes out of quantized
 * layers, the cosines are of 8-bit rows. */
RS_API rs_tensor *rs_token_assign(rs_graph *g, rs_tensor *x, rs_tensor *cu_seqlens, rs_tensor *kept);
/* Means of the rows of x that become one, weighted by sizes [T, 1] (NULL: 1): x [T, C], assign -> [T', C].  score: the one that the
 * rule folds by: in the extra token, a token weighs besides exp of its standardized score; or NULL. */
RS_API rs_tensor *rs_token_merge(rs_graph *g, rs_tensor *x, rs_tensor *assign, rs_tensor *kept, rs_tensor *cu_seqlens,
                                 rs_tensor *sizes, rs_tensor *score);
/* How many tokens each stands for then: [T', 1]. */
RS_API rs_tensor *rs_token_sizes(rs_graph *g, rs_tensor *assign, rs_tensor *kept, rs_tensor *cu_seqlens, rs_tensor *sizes);

/* The names of all operators ("linear", …); NULL past the end. */
RS_API const char *rs_op_name(size_t i);

typedef struct rs_binding {
  rs_tensor *tensor; /* an input, or a tensor marked by rs_output; once each */
  void *data;        /* inputs are read, outputs written */
  size_t bytes;      /* must be what the shape comes to at this run */
} rs_binding;
/* Run with T tokens and B sequences.  Every run plans anew (shapes, places in the arena), in memory that the session keeps for the
 * graph.  All that belongs to a run is the session's: a finished graph may run in several sessions at once. */
RS_API rs_status rs_graph_run(rs_session *session, rs_graph *graph, int64_t tokens, int64_t sequences, const rs_binding *bindings,
                              size_t n_bindings);

/* ------------------------------------------------------------------------------------------------ writing, converting */

typedef struct rs_writer rs_writer;

/* A weight file appears at `path` whole or not at all: everything goes to a temporary file beside it, which rs_writer_finish
 * syncs and renames.  Keys (at most 255 bytes) and tensor names (63) must be unique; any order.  Large tables (RS_ROWS) should be
 * added last.  Floats must be finite, but in tables, which rs_model_verify looks at.  The folder is that of rs_writer_open,
 * wherever the process goes later. */
RS_API rs_status rs_writer_open(const char *path, rs_writer **out);
RS_API rs_status rs_writer_set_bool(rs_writer *w, const char *key, bool value);
RS_API rs_status rs_writer_set_i64(rs_writer *w, const char *key, int64_t value);
RS_API rs_status rs_writer_set_f64(rs_writer *w, const char *key, double value);
RS_API rs_status rs_writer_set_str(rs_writer *w, const char *key, const char *value);
RS_API rs_status rs_writer_set_i64s(rs_writer *w, const char *key, const int64_t *values, size_t n);
RS_API rs_status rs_writer_set_f32s(rs_writer *w, const char *key, const float *values, size_t n);
RS_API rs_status rs_writer_set_strs(rs_writer *w, const char *key, const rs_text *values, size_t n);
RS_API rs_status rs_writer_add(rs_writer *w, const char *name, rs_type type, rs_layout layout, int rank, const int64_t *shape,
                               const void *data, size_t bytes); /* encoded as rs_tensor_encode does */
/* Every key and tensor of a model, as they are: for a file that differs only in metadata.  Keys set before win. */
RS_API rs_status rs_writer_copy(rs_writer *w, const rs_model *model);
RS_API rs_status rs_writer_finish(rs_writer *w); /* on failure nothing has changed at `path` */
RS_API void rs_writer_free(rs_writer *w);        /* removes the temporary file unless finished */

/* Published weights, as plain data: what a reader of safetensors or any other format has to supply. */
typedef struct rs_source_value { /* a value of config.json; nested keys are joined by '.': "id2label.0" */
  const char *key;
  rs_meta_kind kind; /* BOOL, I64, F64 or STR; null values are left out */
  bool boolean;
  int64_t i64;
  double f64; /* set for I64 too */
  const char *str;
} rs_source_value;
typedef struct rs_source_tensor {
  const char *name;
  const char *type_name; /* as published, for errors: "F32", "I64" */
  rs_type type;          /* F32, F16, BF16 or I32; I32 stands for every integer type, which a family may only ignore */
  int rank;
  int64_t shape[RS_MAX_RANK];
  const void *data; /* row major, little endian, any alignment */
} rs_source_tensor;
typedef struct rs_source {
  uint32_t size;
  const rs_source_value *config;
  size_t n_config;
  const rs_source_tensor *tensors;
  size_t n_tensors;
} rs_source;

typedef struct rs_convert_tensor { /* one row of the report */
  const char *name;
  rs_type type;
  rs_layout layout;
  int rank;
  int64_t shape[RS_MAX_RANK];
  size_t bytes;                       /* in the new file */
  double max_error;                   /* largest |w - decoded w|, a scale of inputs (rs_tensor_encode_calibrated) taken back */
  double sum_sq_error, sum_sq, count; /* RMS error = sqrt(sum_sq_error / count) */
  size_t index, total;                /* progress: tensor index of total */
} rs_convert_tensor;

/* What goes into every linear layer of a model on given texts and images (second moments, ranges, a sample).  With it, the rounding
 * error of each quantized weight is made good by the weights behind it (GPTQ: Frantar et al., arXiv 2210.17323).  n_random: how
 * many sequences of tokens drawn from the vocabulary come besides, of 8, 16 … 512 tokens in turn where the model takes as many; a
 * few dozen keep what is rounded from being right for words and lengths of those texts only.  The session should be of an f32 file.
 */
typedef struct rs_calibration rs_calibration;
RS_API rs_status rs_calibrate(rs_session *session, const rs_text *texts, size_t n_texts, size_t n_random, const rs_image *images,
                              size_t n_images, rs_calibration **out);
RS_API void rs_calibration_free(rs_calibration *calibration);
/* rs_tensor_encode for the weight [N, K] of that name; the same as without calibration where it was not among the linear layers
 * that ran.  input_scale: NULL, or [K], which becomes what the layer's inputs are to be multiplied by, channel by channel, before
 * they are quantized; `dst` then has the weight divided by it, and the two belong into one file, the scale as "<name>.input_scale",
 * f32 [K] (SmoothQuant: Xiao et al., arXiv 2211.10438).  All 1 where that would be of little use. */
RS_API rs_status rs_tensor_encode_calibrated(const rs_calibration *calibration, const char *name, rs_type type, rs_layout layout,
                                             int rank, const int64_t *shape, const float *src, void *dst, size_t capacity,
                                             float *input_scale);

typedef struct rs_convert_params {
  uint32_t size;
  const char *type;                  /* "f32", "f16", "q8", "q4": the type of the matrices; NULL: "q8" */
  const rs_calibration *calibration; /* for q8 and q4; NULL: every weight is rounded for itself */
  void (*on_tensor)(void *ctx, const rs_convert_tensor *row);
  void *ctx;
} rs_convert_params;

/* What the converted model will take: so that a caller knows whether to look for a tokenizer, and for how images are prepared. */
RS_API rs_status rs_source_inputs(const rs_source *source, bool *texts, bool *images);
/* Write architecture, hyper-parameters and tensors of `source` into `w`.  An architecture, setting or tensor that no family of
 * models/ knows is an error that names it.  Tokenizer, image preparation, pooling and prompts are metadata that the caller sets
 * (docs/design.md). */
RS_API rs_status rs_convert(const rs_source *source, const rs_convert_params *params, rs_writer *w);

#ifdef __cplusplus
}
#endif
#endif
