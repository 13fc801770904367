/* Callers and the worker that answers them, in one thread: what benchmarks put around a relay.
 *
 *     load -p PORT [-b PORT [-c CERTIFICATE -k KEY]] [-s BYTES] [-r PER_SECOND] [-l SECONDS] [-t FILE] [-u PATH] [-a] [-w]
 *
 * -p  where the relay answers callers           -b  where the worker listens, on loopback (with -c and -k: TLS 1.3)
 * -s  payload of a message                      -r  messages a second, of each call in each direction
 * -l  mean length of a call: it then hangs up, and another calls
 * -t  a file of bearers, one a line, used in turn   -u  path that callers ask for
 * -a  admission: each caller hangs up as soon as it is answered, and calls again
 * -w  look at sockets once in 1 ms only, which is leaner: a relay then never has to wake this process
 *
 * Commands are lines on standard input: `calls N` has so many callers, and is answered once all are live, or with -l
 * once each has been;
 * `reset` begins to count anew; `report` prints what was counted. The end of input ends it.
 *
 * A message carries when it was sent and its number, so that its delay is known and one that is lost is noticed.
 * Messages are spread evenly over time in steps of 1 ms, each call in its own step. Every message costs this process
 * one send and one receive, as it costs a relay; it does nothing else with it.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>
#ifdef WITH_TLS
#include <openssl/err.h>
#include <openssl/ssl.h>
#else
typedef void SSL;
#endif

enum { MAX_CALLS = 8192, MAX_HEAD = 16384, MAX_STEPS = 10000, MAX_BEARERS = 65536, OPENING_AT_ONCE = 64 };
enum { MAX_PAYLOAD = 65536, MAX_UNSENT = 1 << 20 };
static const double PATIENCE = 10; /* seconds for an answer, and for a Close to be returned */

/* --- the clock, delays --- */

static uint64_t nanoseconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static double seconds(void) { return (double)nanoseconds() / 1e9; }

/* Microseconds in buckets: exact below 256, and 1/128 wide above. */
enum { SUB = 128, BUCKETS = SUB * 40 };
struct delays {
    uint64_t count, most, bucket[BUCKETS];
};

static void note(struct delays *delays, uint64_t us) {
    unsigned index = (unsigned)us;
    if (us >= 2 * SUB) {
        unsigned shift = (unsigned)(63 - __builtin_clzll(us)) - 7;
        index = SUB * shift + (unsigned)(us >> shift);
    }
    delays->bucket[index < BUCKETS ? index : BUCKETS - 1]++;
    delays->count++;
    if (us > delays->most) delays->most = us;
}

static double quantile(const struct delays *delays, double share) {
    uint64_t wanted = (uint64_t)((double)delays->count * share), seen = 0;
    for (unsigned index = 0; index < BUCKETS; index++) {
        seen += delays->bucket[index];
        if (seen > wanted) {
            unsigned shift = index < 2 * SUB ? 0 : index / SUB - 1;
            return (double)((uint64_t)(index - SUB * shift) << shift);
        }
    }
    return 0;
}

/* --- one end of a connection --- */

enum state { FREE, CONNECTING, ASKING, LIVE, CLOSING };

struct end {
    struct end *next, **back; /* those that speak in the same millisecond */
    enum state state;
    bool caller, told; /* told: the other side has said Close */
    int fd;
    SSL *tls;
    double since, hangs_up;
    uint64_t asked;
    uint32_t sent, seen;
    size_t have, room, unsent, unsent_room;
    uint8_t *in, *out;
};

static struct {
    int port, worker_port, size, bearers;
    double rate, length;
    bool admission, at_each_step;
    const char *path;
    char **bearer;
#ifdef WITH_TLS
    SSL_CTX *tls;
#endif
} options = {.size = 120, .rate = 50, .path = "/v1/realtime?model=default/echo"};

/* How a call can be lost: so that a number of them says where to look. */
enum why { UNREACHABLE, UNANSWERED, CUT, TOLD, UNRETURNED, RESET, DEAF, UNREADABLE, WHYS };
static const char *const why_names[] = {
    [UNREACHABLE] = "unreachable", /* no connection */
    [UNANSWERED] = "unanswered",   /* gone before the 101 */
    [CUT] = "cut",                 /* a live caller's connection ended without a Close */
    [TOLD] = "told",               /* a live caller was told Close; `code` is the last */
    [UNRETURNED] = "unreturned",   /* the caller's Close was not answered by one before the end */
    [RESET] = "reset",             /* it was, but the connection was then reset */
    [DEAF] = "deaf",               /* a worker's connection was gone when it wanted to speak: no caller lost anything */
    [UNREADABLE] = "unreadable",   /* a frame or a head that is none */
};

static struct {
    uint64_t sent, up, down, opened, ended, gaps, refused, lost, stuck, overflows, why[WHYS];
    int status, code; /* of the last refusal, of the last Close that ended a live call */
    double began, cpu;
    struct delays rising, falling, admission;
} count;

static int epoll, calm, opening, live, there, wanted, reached; /* there: callers that are not FREE */
static int been_live; /* of the callers that are wanted */
static bool was_live[MAX_CALLS];
static struct end callers[MAX_CALLS];
static struct end *steps[MAX_STEPS];
static unsigned step_count;
static uint8_t chunk[1 << 17];

static double cpu(void) {
    struct rusage used;
    getrusage(RUSAGE_SELF, &used);
    return (double)(used.ru_utime.tv_sec + used.ru_stime.tv_sec) +
           (double)(used.ru_utime.tv_usec + used.ru_stime.tv_usec) / 1e6;
}

static void fail(const char *what) {
    perror(what);
    exit(1);
}

static void watch(struct end *end, int how, uint32_t events) {
    struct epoll_event event = {.events = events, .data.ptr = end};
    if (epoll_ctl(calm, how, end->fd, &event)) fail("epoll_ctl");
}

static void speaks(struct end *end) {
    struct end **step = &steps[(unsigned)rand() % step_count];
    end->next = *step;
    end->back = step;
    if (*step) (*step)->back = &end->next;
    *step = end;
}

static void is_silent(struct end *end) {
    if (!end->back) return;
    *end->back = end->next;
    if (end->next) end->next->back = end->back;
    end->back = NULL;
}

static void drop(struct end *end) {
    is_silent(end);
    if (end->caller && (end->state == CONNECTING || end->state == ASKING)) opening--;
    if (end->caller && end->state == LIVE) live--;
    there -= end->caller;
#ifdef WITH_TLS
    if (end->tls) {
        SSL_shutdown(end->tls);
        SSL_free(end->tls);
    }
#endif
    close(end->fd);
    free(end->in);
    free(end->out);
    bool caller = end->caller;
    memset(end, 0, sizeof *end);
    if (!caller) free(end);
}

static void lose(struct end *end, uint64_t *counter) {
    ++*counter;
    drop(end);
}

static void miss(struct end *end, enum why why) {
    count.why[why]++;
    if (end->caller)
        lose(end, &count.lost);
    else
        drop(end); /* by a relay that gave up on its dial, or on the worker's Close: callers tell whether a call was lost */
}

/* Why an end in its state is lost when its connection is gone. */
static enum why gone(const struct end *end) {
    if (!end->caller) return DEAF;
    switch (end->state) {
        case CONNECTING: return UNREACHABLE;
        case ASKING: return UNANSWERED;
        case CLOSING: return end->told ? RESET : UNRETURNED;
        default: return CUT;
    }
}

/* Bytes written, 0 when the socket is full, -1 when it is gone. */
static ssize_t push(struct end *end, const uint8_t *data, size_t size) {
#ifdef WITH_TLS
    if (end->tls) {
        ERR_clear_error();
        int done = SSL_write(end->tls, data, (int)size);
        if (done > 0) return done;
        int error = SSL_get_error(end->tls, done);
        return error == SSL_ERROR_WANT_WRITE || error == SSL_ERROR_WANT_READ ? 0 : -1;
    }
#endif
    ssize_t done = send(end->fd, data, size, MSG_NOSIGNAL);
    return done >= 0 ? done : errno == EAGAIN ? 0 : -1;
}

static ssize_t pull(struct end *end, uint8_t *data, size_t size) {
#ifdef WITH_TLS
    if (end->tls) {
        ERR_clear_error();
        int done = SSL_read(end->tls, data, (int)size);
        if (done > 0) return done;
        int error = SSL_get_error(end->tls, done);
        errno = error == SSL_ERROR_WANT_READ || error == SSL_ERROR_WANT_WRITE ? EAGAIN : EPROTO;
        return error == SSL_ERROR_ZERO_RETURN ? 0 : -1;
    }
#endif
    return recv(end->fd, data, size, 0);
}

/* False when the end is gone. What the socket does not take is kept. */
static bool put(struct end *end, const uint8_t *data, size_t size) {
    ssize_t done = end->unsent ? 0 : push(end, data, size);
    if (done < 0) {
        miss(end, gone(end));
        return false;
    }
    size_t left = size - (size_t)done;
    if (!left) return true;
    if (end->unsent + left > MAX_UNSENT) {
        lose(end, &count.overflows);
        return false;
    }
    if (end->unsent + left > end->unsent_room) {
        end->unsent_room = 2 * (end->unsent + left);
        if (!(end->out = realloc(end->out, end->unsent_room))) fail("realloc");
    }
    memcpy(end->out + end->unsent, data + done, left);
    if (!end->unsent) watch(end, EPOLL_CTL_MOD, EPOLLIN | EPOLLOUT);
    end->unsent += left;
    return true;
}

static bool flush(struct end *end) {
    ssize_t done = push(end, end->out, end->unsent);
    if (done < 0) {
        miss(end, gone(end));
        return false;
    }
    end->unsent -= (size_t)done;
    memmove(end->out, end->out + done, end->unsent);
    if (!end->unsent) watch(end, EPOLL_CTL_MOD, EPOLLIN);
    return true;
}

/* --- WebSocket, RFC 6455 --- */

/* A frame of one opcode; a caller's is masked. */
static bool put_frame(struct end *end, uint8_t opcode, const uint8_t *payload, size_t size) {
    static uint8_t frame[MAX_PAYLOAD + 14];
    size_t at = 2;
    frame[0] = 0x80 | opcode;
    frame[1] = end->caller ? 0x80 : 0;
    if (size < 126) {
        frame[1] |= (uint8_t)size;
    } else if (size < 65536) {
        frame[1] |= 126;
        frame[at++] = (uint8_t)(size >> 8);
        frame[at++] = (uint8_t)size;
    } else {
        frame[1] |= 127;
        for (int shift = 56; shift >= 0; shift -= 8) frame[at++] = (uint8_t)((uint64_t)size >> shift);
    }
    if (end->caller) {
        uint32_t drawn = (uint32_t)random();
        uint8_t mask[4];
        memcpy(mask, &drawn, 4);
        memcpy(frame + at, mask, 4);
        at += 4;
        for (size_t i = 0; i < size; i++) frame[at + i] = payload[i] ^ mask[i & 3];
    } else {
        memcpy(frame + at, payload, size);
    }
    return put(end, frame, at + size);
}

static bool say(struct end *end) {
    static uint8_t payload[MAX_PAYLOAD];
    uint64_t now = nanoseconds();
    memcpy(payload, &now, 8);
    memcpy(payload + 8, &end->sent, 4);
    end->sent++;
    count.sent++;
    return put_frame(end, 2, payload, (size_t)options.size);
}

static bool hang_up(struct end *end) {
    static const uint8_t normal[] = {1000 >> 8, 1000 & 255};
    if (end->caller && end->state == LIVE) live--;
    end->state = CLOSING;
    end->since = seconds();
    is_silent(end);
    return put_frame(end, 8, normal, sizeof normal);
}

static void heard(struct end *end, const uint8_t *payload) {
    uint64_t sent_at;
    uint32_t number;
    memcpy(&sent_at, payload, 8);
    memcpy(&number, payload + 8, 4);
    count.gaps += number != end->seen;
    end->seen = number + 1;
    note(end->caller ? &count.falling : &count.rising, (nanoseconds() - sent_at) / 1000);
    ++*(end->caller ? &count.down : &count.up);
}

/* Acts on the whole frames at the start of `in`; false when the end is gone. */
static bool read_frames(struct end *end) {
    size_t at = 0;
    while (end->have - at >= 2) {
        uint8_t *frame = end->in + at;
        size_t got = end->have - at, size = frame[1] & 127, head = 2;
        bool masked = frame[1] & 128;
        if (size > 125) {
            head = size == 126 ? 4 : 10;
            if (got < head) break;
            size = 0;
            for (size_t i = 2; i < head; i++) size = size << 8 | frame[i];
        }
        head += masked ? 4 : 0;
        if (size > MAX_PAYLOAD) {
            miss(end, UNREADABLE);
            return false;
        }
        if (got < head + size) break;
        uint8_t opcode = frame[0] & 15;
        if (opcode == 2 && size >= 12) {
            for (size_t i = 0; masked && i < 12; i++) frame[head + i] ^= frame[head - 4 + (i & 3)];
            heard(end, frame + head);
        } else if (opcode == 8 && !end->told) {
            end->told = true;
            if (end->caller && end->state == LIVE) { /* nobody but callers hangs up here */
                if (size >= 2) count.code = frame[head] << 8 | frame[head + 1]; /* a relay's is not masked */
                miss(end, TOLD);
                return false;
            }
            if (end->state == LIVE && !hang_up(end)) return false;
        }
        at += head + size;
    }
    end->have -= at;
    memmove(end->in, end->in + at, end->have);
    return true;
}

static uint32_t turned(uint32_t word, int by) { return word << by | word >> (32 - by); }

static void sha1(const char *text, uint8_t digest[20]) { /* FIPS 180-4, of at most 119 bytes */
    uint32_t hash[5] = {0x67452301, 0xefcdab89, 0x98badcfe, 0x10325476, 0xc3d2e1f0};
    uint8_t padded[128] = {0};
    size_t size = strlen(text), total = size + 9 <= 64 ? 64 : 128;
    memcpy(padded, text, size);
    padded[size] = 0x80;
    padded[total - 2] = (uint8_t)(size * 8 >> 8);
    padded[total - 1] = (uint8_t)(size * 8);
    for (uint8_t *block = padded; block < padded + total; block += 64) {
        uint32_t w[80], a = hash[0], b = hash[1], c = hash[2], d = hash[3], e = hash[4];
        for (int i = 0; i < 16; i++)
            w[i] = (uint32_t)block[4 * i] << 24 | (uint32_t)block[4 * i + 1] << 16 |
                   (uint32_t)block[4 * i + 2] << 8 | block[4 * i + 3];
        for (int i = 16; i < 80; i++) w[i] = turned(w[i - 3] ^ w[i - 8] ^ w[i - 14] ^ w[i - 16], 1);
        for (int i = 0; i < 80; i++) {
            uint32_t f = i < 20   ? ((b & c) | (~b & d)) + 0x5a827999
                         : i < 40 ? (b ^ c ^ d) + 0x6ed9eba1
                         : i < 60 ? ((b & c) | (b & d) | (c & d)) + 0x8f1bbcdc
                                  : (b ^ c ^ d) + 0xca62c1d6;
            uint32_t next = turned(a, 5) + f + e + w[i];
            e = d, d = c, c = turned(b, 30), b = a, a = next;
        }
        hash[0] += a, hash[1] += b, hash[2] += c, hash[3] += d, hash[4] += e;
    }
    for (int i = 0; i < 20; i++) digest[i] = (uint8_t)(hash[i / 4] >> (24 - 8 * (i % 4)));
}

/* Sec-WebSocket-Accept for a key of 24 characters. */
static void acceptance(const char *key, char text[29]) {
    static const char letters[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    char keyed[64];
    uint8_t digest[21] = {0};
    snprintf(keyed, sizeof keyed, "%.24s258EAFA5-E914-47DA-95CA-C5AB0DC85B11", key);
    sha1(keyed, digest);
    for (int i = 0; i < 7; i++) {
        uint32_t three = (uint32_t)digest[3 * i] << 16 | (uint32_t)digest[3 * i + 1] << 8 | digest[3 * i + 2];
        for (int j = 0; j < 4; j++) text[4 * i + j] = letters[three >> (18 - 6 * j) & 63];
    }
    text[27] = '=';
    text[28] = 0;
}

/* --- callers --- */

static void call(struct end *end) {
    struct sockaddr_in to = {.sin_family = AF_INET,
                             .sin_port = htons((uint16_t)options.port),
                             .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), on = 1;
    if (fd < 0) fail("socket");
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    *end = (struct end){.caller = true, .fd = fd, .state = CONNECTING, .since = seconds()};
    opening++;
    there++;
    if (connect(fd, (struct sockaddr *)&to, sizeof to) && errno != EINPROGRESS) {
        miss(end, UNREACHABLE);
        return;
    }
    watch(end, EPOLL_CTL_ADD, EPOLLIN | EPOLLOUT);
}

static bool ask(struct end *end) {
    static uint64_t number;
    char request[MAX_HEAD];
    const char *bearer = options.bearers ? options.bearer[number++ % (uint64_t)options.bearers] : "";
    int size = snprintf(request, sizeof request,
                        "GET %s HTTP/1.1\r\nHost: gateway\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n%s%s%s\r\n",
                        options.path, *bearer ? "Authorization: Bearer " : "", bearer, *bearer ? "\r\n" : "");
    watch(end, EPOLL_CTL_MOD, EPOLLIN);
    end->state = ASKING;
    end->asked = nanoseconds();
    return put(end, (uint8_t *)request, (size_t)size);
}

static bool is_answered(struct end *end) {
    end->in[end->have < end->room ? end->have : end->room - 1] = 0;
    char *head_end = strstr((char *)end->in, "\r\n\r\n");
    if (!head_end) return true;
    int status = end->have > 12 ? atoi((char *)end->in + 9) : 0;
    if (status != 101) {
        count.status = status;
        lose(end, &count.refused);
        return false;
    }
    note(&count.admission, (nanoseconds() - end->asked) / 1000);
    size_t head = (size_t)(head_end + 4 - (char *)end->in);
    end->have -= head;
    memmove(end->in, end->in + head, end->have);
    opening--;
    live++;
    count.opened++;
    been_live += !was_live[end - callers];
    was_live[end - callers] = true;
    end->state = LIVE;
    end->hangs_up = options.length ? seconds() + options.length * (0.5 + drand48()) : 0;
    if (options.admission) return hang_up(end);
    if (options.rate) speaks(end);
    return read_frames(end);
}

/* --- the worker --- */

static void take(int listener) {
    for (;;) {
        int fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK), on = 1;
        if (fd < 0) return;
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
        struct end *end = calloc(1, sizeof *end);
        if (!end) fail("calloc");
        *end = (struct end){.fd = fd, .state = ASKING, .since = seconds()};
#ifdef WITH_TLS
        if (options.tls) {
            end->tls = SSL_new(options.tls);
            SSL_set_fd(end->tls, fd);
            SSL_set_accept_state(end->tls);
        }
#endif
        watch(end, EPOLL_CTL_ADD, EPOLLIN);
    }
}

static bool is_asked(struct end *end) {
    char response[256], accepted[29];
    end->in[end->have < end->room ? end->have : end->room - 1] = 0;
    char *head_end = strstr((char *)end->in, "\r\n\r\n");
    if (!head_end) return true;
    char *key = strcasestr((char *)end->in, "Sec-WebSocket-Key:");
    if (!key) {
        miss(end, UNREADABLE);
        return false;
    }
    acceptance(key + 18 + strspn(key + 18, " "), accepted);
    int size = snprintf(response, sizeof response,
                        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                        "Sec-WebSocket-Accept: %s\r\n\r\n",
                        accepted);
    size_t head = (size_t)(head_end + 4 - (char *)end->in);
    end->have -= head;
    memmove(end->in, end->in + head, end->have);
    end->state = LIVE;
    if (!put(end, (uint8_t *)response, (size_t)size)) return false;
    if (options.rate && !options.admission) speaks(end);
    return read_frames(end);
}

/* --- the loop --- */

static void ended(struct end *end, bool cleanly) {
    if (!end->caller) { /* a worker sees its calls go in whatever way the relay ends them */
        drop(end);
    } else if (end->state == CLOSING && end->told && cleanly) {
        lose(end, &count.ended);
    } else {
        miss(end, gone(end));
    }
}

static void act(struct end *end, uint32_t events) {
    if (end->state == CONNECTING) {
        int error = 0;
        socklen_t size = sizeof error;
        getsockopt(end->fd, SOL_SOCKET, SO_ERROR, &error, &size);
        if (error) {
            miss(end, UNREACHABLE);
            return;
        }
        if (!ask(end)) return;
    } else if (events & EPOLLOUT && end->unsent && !flush(end)) {
        return;
    }
    if (!(events & (EPOLLIN | EPOLLHUP | EPOLLERR))) return;
    /* TLS holds decrypted bytes that epoll does not know of, so it is read until there are none. */
    for (;;) {
        ssize_t got = pull(end, chunk, sizeof chunk);
        if (got < 0 && errno == EAGAIN) return;
        if (got <= 0) {
            ended(end, got == 0);
            return;
        }
        if (end->have + (size_t)got + 1 > end->room) {
            end->room = end->have + (size_t)got + 1;
            if (!(end->in = realloc(end->in, end->room))) fail("realloc");
        }
        memcpy(end->in + end->have, chunk, (size_t)got);
        end->have += (size_t)got;
        bool goes_on = end->state == ASKING ? (end->caller ? is_answered(end) : is_asked(end)) : read_frames(end);
        if (!goes_on) return;
        if (end->state == CLOSING && !end->caller && end->told && !end->unsent) {
            drop(end); /* a server closes first, RFC 6455 section 7.1.1 */
            return;
        }
        if (!end->tls) return;
    }
}

static void speak(unsigned step, double now) {
    struct end *next;
    for (struct end *end = steps[step]; end; end = next) {
        next = end->next;
        if (end->caller && end->hangs_up && now > end->hangs_up)
            hang_up(end);
        else
            say(end);
    }
}

/* Has as many callers as are wanted, and gives up on those that wait too long. */
static void keep_calling(double now) {
    static int next; /* where a free place was last found: a scan from the start for each call would be our cost */
    for (int tried = 0; there < wanted && opening < OPENING_AT_ONCE && tried < wanted; tried++) {
        next = next + 1 < wanted ? next + 1 : 0;
        if (callers[next].state == FREE) call(&callers[next]);
    }
    for (int i = wanted; live > wanted && i < MAX_CALLS; i++)
        if (callers[i].state == LIVE) hang_up(&callers[i]);
    static double looked;
    if (now - looked < 1) return;
    looked = now;
    for (int i = 0; i < MAX_CALLS; i++) {
        struct end *end = &callers[i];
        if (end->state != FREE && end->state != LIVE && now - end->since > PATIENCE) lose(end, &count.stuck);
    }
}

static void reset(void) {
    memset(&count, 0, sizeof count);
    count.began = seconds();
    count.cpu = cpu();
}

static void print_delays(const char *name, const struct delays *delays) {
    printf(", \"%s\": {\"count\": %lu, \"p50\": %.0f, \"p99\": %.0f, \"most\": %lu}", name, delays->count,
           quantile(delays, 0.5), quantile(delays, 0.99), delays->most);
}

static void report(void) {
    printf("{\"seconds\": %.6f, \"cpu\": %.6f, \"live\": %d, \"sent\": %lu, \"received\": %lu, \"opened\": %lu, "
           "\"ended\": %lu, \"gaps\": %lu, \"refused\": %lu, \"status\": %d, \"lost\": %lu, \"stuck\": %lu, "
           "\"overflows\": %lu, \"code\": %d, \"why\": {",
           seconds() - count.began, cpu() - count.cpu, live, count.sent, count.up + count.down, count.opened,
           count.ended, count.gaps, count.refused, count.status, count.lost, count.stuck, count.overflows,
           count.code);
    for (int why = 0; why < WHYS; why++) printf("%s\"%s\": %lu", why ? ", " : "", why_names[why], count.why[why]);
    printf("}");
    print_delays("up", &count.rising);
    print_delays("down", &count.falling);
    print_delays("admission", &count.admission);
    puts("}");
    fflush(stdout);
}

/* False at the end of input. */
static bool obey(void) {
    static char text[4096];
    static size_t have;
    ssize_t got = read(0, text + have, sizeof text - 1 - have);
    if (got <= 0) return false;
    have += (size_t)got;
    text[have] = 0;
    char *line = text;
    for (char *stop; (stop = strchr(line, '\n')); line = stop + 1) {
        *stop = 0;
        if (!strncmp(line, "calls ", 6)) {
            wanted = atoi(line + 6) < MAX_CALLS ? atoi(line + 6) : MAX_CALLS;
            reached = -1;
            been_live = 0;
            for (int i = 0; i < MAX_CALLS; i++) been_live += was_live[i] = i < wanted && callers[i].state == LIVE;
        } else if (!strcmp(line, "reset")) {
            reset();
            puts("{}");
            fflush(stdout);
        } else if (!strcmp(line, "report")) {
            report();
        }
    }
    have -= (size_t)(line - text);
    memmove(text, line, have);
    return true;
}

static int listen_on(int port) {
    struct sockaddr_in at = {.sin_family = AF_INET,
                             .sin_port = htons((uint16_t)port),
                             .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), on = 1;
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (bind(fd, (struct sockaddr *)&at, sizeof at) || listen(fd, 4096)) fail("listen");
    return fd;
}

static void read_bearers(const char *path) {
    static char line[MAX_HEAD];
    FILE *file = fopen(path, "r");
    if (!file) fail(path);
    options.bearer = calloc(MAX_BEARERS, sizeof *options.bearer);
    while (options.bearers < MAX_BEARERS && fgets(line, sizeof line, file)) {
        line[strcspn(line, "\n")] = 0;
        options.bearer[options.bearers++] = strdup(line);
    }
    fclose(file);
}

static void use_tls(const char *certificate, const char *key) {
#ifdef WITH_TLS
    options.tls = SSL_CTX_new(TLS_server_method());
    SSL_CTX_set_min_proto_version(options.tls, TLS1_3_VERSION);
    SSL_CTX_set_num_tickets(options.tls, 0);
    SSL_CTX_set_mode(options.tls, SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER);
    if (SSL_CTX_use_certificate_chain_file(options.tls, certificate) != 1 ||
        SSL_CTX_use_PrivateKey_file(options.tls, key, SSL_FILETYPE_PEM) != 1) {
        fprintf(stderr, "load: %s and %s are no certificate and key in PEM\n", certificate, key);
        exit(1);
    }
#else
    fprintf(stderr, "load: built without OpenSSL, so %s and %s cannot be used\n", certificate, key);
    exit(1);
#endif
}

static void read_options(int count_, char **words) {
    const char *certificate = NULL, *key = NULL;
    for (int option; (option = getopt(count_, words, "p:b:c:k:s:r:l:t:u:aw")) != -1;) switch (option) {
            case 'p': options.port = atoi(optarg); break;
            case 'b': options.worker_port = atoi(optarg); break;
            case 'c': certificate = optarg; break;
            case 'k': key = optarg; break;
            case 's': options.size = atoi(optarg); break;
            case 'r': options.rate = atof(optarg); break;
            case 'l': options.length = atof(optarg); break;
            case 't': read_bearers(optarg); break;
            case 'u': options.path = optarg; break;
            case 'w': options.at_each_step = true; break;
            case 'a': options.admission = true; break;
            default: exit(2);
        }
    if (options.size < 12 || options.size > MAX_PAYLOAD) {
        fprintf(stderr, "load: -s must lie between 12 and %d\n", MAX_PAYLOAD);
        exit(2);
    }
    if (certificate && key) use_tls(certificate, key);
}

int main(int words, char **word) {
    read_options(words, word);
    signal(SIGPIPE, SIG_IGN); /* OpenSSL writes without MSG_NOSIGNAL */
    struct rlimit files;
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    step_count = options.rate ? (unsigned)(1000 / options.rate) : 1;
    step_count = step_count < 1 ? 1 : step_count > MAX_STEPS ? MAX_STEPS : step_count;
    epoll = epoll_create1(0);
    int listener = options.worker_port ? listen_on(options.worker_port) : -1;
    int timer = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK);
    struct itimerspec every = {{0, 1000000}, {0, 1000000}};
    timerfd_settime(timer, 0, &every, NULL);
    /* What nobody waits for wakes nobody: with -w, sockets are looked at with each step only. */
    calm = options.at_each_step ? epoll_create1(0) : epoll;
    int aside[] = {0, timer, listener};
    for (int i = 0; i < (listener < 0 ? 2 : 3); i++) {
        struct epoll_event event = {.events = EPOLLIN, .data.ptr = &aside[i]};
        if (epoll_ctl(epoll, EPOLL_CTL_ADD, aside[i], &event)) fail("epoll_ctl");
    }
    reset();
    for (unsigned step = 0;;) {
        struct epoll_event events[512];
        uint64_t ticks = 0;
        bool commanded = false;
        int found = epoll_wait(epoll, events, 512, -1);
        for (int i = 0; i < found; i++) {
            void *what = events[i].data.ptr;
            if (what == &aside[0]) commanded = true;
            else if (what == &aside[1]) { if (read(timer, &ticks, 8) != 8) ticks = 0; }
            else if (what == &aside[2]) take(listener);
            else act(what, events[i].events);
        }
        while (options.at_each_step && (found = epoll_wait(calm, events, 512, 0)) > 0)
            for (int i = 0; i < found; i++) act(events[i].data.ptr, events[i].events);
        /* What can end other connections than the one at hand comes after the events that may name them. */
        if (commanded && !obey()) return 0;
        double now = seconds();
        for (; ticks; ticks--) speak(step++ % step_count, now);
        keep_calling(now);
        bool all = options.length ? been_live >= wanted : live == wanted;
        if (reached != wanted && all && !options.admission) {
            reached = wanted;
            printf("{\"live\": %d}\n", live);
            fflush(stdout);
        }
    }
}
