/* Reads many event streams at once and notes when their chunks come.

   stream_reader BODY_FILE KEY STREAMS SPREAD_MS CHUNKS GAP_MS PORT...

   Posts BODY_FILE to /v1/chat/completions on 127.0.0.1, to the ports by turns, one stream after the other over
   SPREAD_MS. Prints JSON: of each stream the time from its request to its first token, and by how much its slowest
   token was later than GAP_MS after the one before. A stream that ends early, or has not CHUNKS tokens, is an error.
   Compiled, so that on a small machine the driver takes as little as it can from what is measured. */

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define BUFFER_BYTES 65536
#define KEEP_BYTES 16
#define GIVE_UP_MS 60000

static const char OK[] = "HTTP/1.1 200";
static const char TOKEN[] = "\"content\":\" t";
static const char DONE[] = "[DONE]";

typedef struct {
  int socket;
  int tokens;
  int done;
  size_t kept; /* bytes of the end of what was read: a mark may be cut in two */
  char keep[KEEP_BYTES];
  double began_ms, last_ms, first_ms, stall_ms;
} Stream;

static double now_ms(void) {
  struct timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return time.tv_sec * 1e3 + time.tv_nsec / 1e6;
}

static void fail(const char *what, long number) {
  fprintf(stderr, "stream_reader: %s (%ld): %s\n", what, number, strerror(errno));
  exit(1);
}

static void begin(Stream *stream, int port, const char *request, size_t size) {
  struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port)};
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  int yes = 1;
  stream->socket = socket(AF_INET, SOCK_STREAM, 0);
  setsockopt(stream->socket, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
  if (connect(stream->socket, (struct sockaddr *)&address, sizeof address)) fail("cannot connect", port);
  stream->began_ms = now_ms();
  if (write(stream->socket, request, size) != (ssize_t)size) fail("cannot write", port);
}

static int count(const char *data, size_t size, const char *mark, size_t mark_size) {
  int found = 0;
  const char *end = data + size;
  while ((data = memmem(data, end - data, mark, mark_size))) found++, data += mark_size;
  return found;
}

/* How many marks are in `data` that were not whole in its first `known` bytes. */
static int fresh(const char *data, size_t size, size_t known, const char *mark, size_t mark_size) {
  size_t skip = known >= mark_size ? known - (mark_size - 1) : 0;
  return count(data + skip, size - skip, mark, mark_size);
}

static void take(Stream *stream, double gap_ms, int chunks) {
  static char buffer[KEEP_BYTES + BUFFER_BYTES];
  memcpy(buffer, stream->keep, stream->kept);
  ssize_t got = read(stream->socket, buffer + stream->kept, BUFFER_BYTES);
  double at_ms = now_ms();
  if (got <= 0) fail("a stream ended early, after tokens", stream->tokens);
  size_t size = stream->kept + got;
  if (!stream->kept && (size < sizeof OK - 1 || memcmp(buffer, OK, sizeof OK - 1))) {
    fprintf(stderr, "stream_reader: answered %.*s\n", (int)(size < 600 ? size : 600), buffer);
    exit(1);
  }
  int new = fresh(buffer, size, stream->kept, TOKEN, sizeof TOKEN - 1);
  if (new) {
    if (!stream->tokens) {
      stream->first_ms = at_ms - stream->began_ms;
    } else if (at_ms - stream->last_ms - gap_ms > stream->stall_ms) {
      stream->stall_ms = at_ms - stream->last_ms - gap_ms;
    }
    stream->tokens += new;
    stream->last_ms = at_ms;
  }
  if (fresh(buffer, size, stream->kept, DONE, sizeof DONE - 1)) {
    if (stream->tokens != chunks) fail("a stream had another number of tokens", stream->tokens);
    stream->done = 1;
    close(stream->socket);
  }
  stream->kept = size < KEEP_BYTES ? size : KEEP_BYTES;
  memcpy(stream->keep, buffer + size - stream->kept, stream->kept);
}

static void print(const char *name, const Stream *streams, int number, int stall) {
  printf("\"%s\": [", name);
  for (int i = 0; i < number; i++)
    printf("%s%.4f", i ? ", " : "", stall ? streams[i].stall_ms : streams[i].first_ms);
  printf("]");
}

int main(int argc, char **argv) {
  if (argc < 8) fail("usage: stream_reader BODY_FILE KEY STREAMS SPREAD_MS CHUNKS GAP_MS PORT...", argc);
  int number = atoi(argv[3]), chunks = atoi(argv[5]), ports = argc - 7;
  double spread_ms = atof(argv[4]), gap_ms = atof(argv[6]);
  static char body[BUFFER_BYTES], request[BUFFER_BYTES * 2];
  FILE *file = fopen(argv[1], "rb");
  if (!file) fail("cannot read the body", 0);
  size_t body_size = fread(body, 1, sizeof body, file);
  fclose(file);
  size_t size = snprintf(request, sizeof request,
                         "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer %s\r\n"
                         "content-type: application/json\r\ncontent-length: %zu\r\n\r\n%.*s",
                         argv[2], body_size, (int)body_size, body);
  Stream *streams = calloc(number, sizeof *streams);
  int poll = epoll_create1(0), started = 0, done = 0;
  double start_ms = now_ms();
  while (done < number) {
    double at_ms = now_ms() - start_ms;
    if (at_ms > spread_ms + chunks * gap_ms + GIVE_UP_MS) fail("gave up; streams done", done);
    while (started < number && at_ms >= spread_ms * started / number) {
      begin(&streams[started], atoi(argv[7 + started % ports]), request, size);
      struct epoll_event event = {.events = EPOLLIN, .data.ptr = &streams[started]};
      epoll_ctl(poll, EPOLL_CTL_ADD, streams[started++].socket, &event);
    }
    struct epoll_event events[64];
    int wait_ms = started < number ? 1 : 100;
    int ready = epoll_wait(poll, events, 64, wait_ms);
    for (int i = 0; i < ready; i++) {
      Stream *stream = events[i].data.ptr;
      take(stream, gap_ms, chunks);
      done += stream->done;
    }
  }
  printf("{");
  print("ttft_ms", streams, number, 0);
  printf(", ");
  print("stall_ms", streams, number, 1);
  printf("}\n");
  return 0;
}
