/* Some clients of an OpenAI API on this machine, each asking one thing after the other on a connection of its own.

   load_driver BODIES KEY PORT CLIENTS REQUESTS

   BODIES holds CLIENTS x REQUESTS JSON bodies, a line each: first all of the first client. They are posted to
   /v1/chat/completions on 127.0.0.1. Prints JSON: the seconds it all took, of each answer those until its end and until
   the first bytes of its body, and the output tokens that the answers' usage names, added up. An answer that is refused,
   cut, or names no usage is an error. Compiled, so that on a small machine the driver takes as little as it can from
   what is measured. */

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

#define ANSWER_BYTES (4 << 20)
#define GIVE_UP_MS 300000

static const char CHUNKS_END[] = "\r\n0\r\n\r\n";
static const char USAGE[] = "\"completion_tokens\":";

typedef struct {
  int socket, asked;
  char **bodies;
  char *answer; /* what came of the answer under way, headers and all */
  size_t size;
  double began_s, first_s;
} Client;

static int port, requests;
static const char *key;
static double *latency_s, *first_chunk_s;
static int answered;
static long output_tokens;

static double now_s(void) {
  struct timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return time.tv_sec + time.tv_nsec / 1e9;
}

static void fail(const char *what, const Client *client) {
  fprintf(stderr, "load_driver: %s: %s\n", what, errno ? strerror(errno) : "");
  if (client) fprintf(stderr, "answer: %.*s\n", (int)(client->size < 600 ? client->size : 600), client->answer);
  exit(1);
}

static void join(Client *client) {
  struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port)};
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  int yes = 1;
  client->socket = socket(AF_INET, SOCK_STREAM, 0);
  setsockopt(client->socket, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
  if (connect(client->socket, (struct sockaddr *)&address, sizeof address)) fail("cannot connect", NULL);
}

static void ask(Client *client) {
  const char *body = client->bodies[client->asked++];
  char *request;
  int size = asprintf(&request,
                      "POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: Bearer %s\r\n"
                      "content-type: application/json\r\ncontent-length: %zu\r\n\r\n%s",
                      key, strlen(body), body);
  client->size = 0;
  client->first_s = 0;
  client->began_s = now_s();
  if (size < 0 || write(client->socket, request, size) != size) fail("cannot write", NULL);
  free(request);
}

/* Whether the answer is whole; notes when the first bytes of its body came. */
static int is_whole(Client *client, double at_s) {
  client->answer[client->size] = 0;
  char *head_end = memmem(client->answer, client->size, "\r\n\r\n", 4);
  if (!head_end) return 0;
  char *body = head_end + 4, *length = strcasestr(client->answer, "\r\ncontent-length:");
  size_t got = client->size - (body - client->answer), tail = sizeof CHUNKS_END - 1;
  if (got && !client->first_s) client->first_s = at_s;
  if (length && length < head_end) return got >= (size_t)atol(length + strlen("\r\ncontent-length:"));
  return got >= tail && !memcmp(client->answer + client->size - tail, CHUNKS_END, tail);
}

static void note(const Client *client, double at_s) {
  if (strncmp(client->answer, "HTTP/1.1 200", 12)) fail("refused", client);
  const char *usage = NULL, *at = client->answer;
  while ((at = strstr(at, USAGE))) usage = at += sizeof USAGE - 1;
  if (!usage) fail("an answer without usage", client);
  if (strcasestr(client->answer, "text/event-stream") && !strstr(client->answer, "data: [DONE]"))
    fail("a stream was cut", client);
  output_tokens += atol(usage);
  latency_s[answered] = at_s - client->began_s;
  first_chunk_s[answered++] = client->first_s - client->began_s;
}

/* Reads what is there. Returns 1 when it was this client's last answer. */
static int take(Client *client) {
  ssize_t got = read(client->socket, client->answer + client->size, ANSWER_BYTES - client->size);
  double at_s = now_s();
  if (got <= 0) fail("a connection ended, or an answer is too long", client);
  client->size += got;
  if (!is_whole(client, at_s)) return 0;
  note(client, at_s);
  if (client->asked == requests) return 1;
  ask(client);
  return 0;
}

static void print(const char *name, const double *values) {
  printf(", \"%s\": [", name);
  for (int i = 0; i < answered; i++) printf("%s%.6f", i ? ", " : "", values[i]);
  printf("]");
}

int main(int argc, char **argv) {
  if (argc != 6) fail("usage: load_driver BODIES KEY PORT CLIENTS REQUESTS", NULL);
  key = argv[2], port = atoi(argv[3]), requests = atoi(argv[5]);
  int number = atoi(argv[4]), left = number, poll = epoll_create1(0);
  FILE *file = fopen(argv[1], "r");
  if (!file) fail("cannot read the bodies", NULL);
  Client *clients = calloc(number, sizeof *clients);
  latency_s = calloc(number * requests, sizeof *latency_s);
  first_chunk_s = calloc(number * requests, sizeof *first_chunk_s);
  for (Client *client = clients; client < clients + number; client++) {
    client->bodies = calloc(requests, sizeof *client->bodies);
    client->answer = malloc(ANSWER_BYTES + 1);
    for (int i = 0; i < requests; i++) {
      size_t room = 0;
      if (getline(&client->bodies[i], &room, file) < 0) fail("too few bodies", NULL);
      client->bodies[i][strcspn(client->bodies[i], "\n")] = 0;
    }
    join(client);
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = client};
    epoll_ctl(poll, EPOLL_CTL_ADD, client->socket, &event);
  }
  double began_s = now_s();
  for (int i = 0; i < number; i++) ask(&clients[i]);
  while (left) {
    struct epoll_event events[64];
    int ready = epoll_wait(poll, events, 64, GIVE_UP_MS);
    if (ready <= 0) fail("nothing came for five minutes", NULL);
    for (int i = 0; i < ready; i++) left -= take(events[i].data.ptr);
  }
  printf("{\"took_s\": %.6f, \"output_tokens\": %ld", now_s() - began_s, output_tokens);
  print("latency_s", latency_s);
  print("first_chunk_s", first_chunk_s);
  printf("}\n");
  return 0;
}
