// The engine of tests/bench/gateway: reads requests to their end, and answers each with the same chat.
//
//   constant PORT
//
// It knows just enough of HTTP for those who are measured (Content-Length, one request at a time on a connection), and
// does so little that none of them waits for it.

#define _GNU_SOURCE
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#define HEAD_BYTES 8192
#define BODY_BYTES (256 * 1024)
#define EVENTS 256

static const char CHAT[] =
    "{\"id\":\"chatcmpl-1\",\"object\":\"chat.completion\",\"created\":1,\"model\":\"m\",\"choices\":[{\"index\":0,"
    "\"message\":{\"role\":\"assistant\",\"content\":\"What the engine says is always the same, and of a length that is "
    "not unusual for an answer to a short question.\"},\"finish_reason\":\"stop\"}],"
    "\"usage\":{\"prompt_tokens\":5,\"completion_tokens\":24,\"total_tokens\":29}}";

struct connection {
    int fd;
    size_t held;    // bytes of a head that is not complete
    size_t missing; // bytes of a body
    char head[HEAD_BYTES + 1];
};

static char answer[1024];
static int answer_bytes;
static char body[BODY_BYTES];

static void die(const char *what) {
    perror(what);
    exit(1);
}

// 0: this connection is over.
static int reply(struct connection *connection) {
    return send(connection->fd, answer, answer_bytes, MSG_NOSIGNAL) == answer_bytes;
}

static int read_head(struct connection *connection) {
    ssize_t got = recv(connection->fd, connection->head + connection->held, HEAD_BYTES - connection->held, 0);
    if (got <= 0) return 0;
    connection->held += got;
    connection->head[connection->held] = 0;
    char *end = strstr(connection->head, "\r\n\r\n");
    if (!end) return connection->held < HEAD_BYTES;
    char *length = strcasestr(connection->head, "\r\ncontent-length:");
    size_t wanted = length && length < end ? strtoul(length + 17, NULL, 10) : 0;
    size_t there = connection->held - (end + 4 - connection->head);
    connection->held = 0;
    if (there > wanted) return 0;
    connection->missing = wanted - there;
    return connection->missing || reply(connection);
}

static int read_body(struct connection *connection) {
    size_t most = connection->missing < BODY_BYTES ? connection->missing : BODY_BYTES;
    ssize_t got = recv(connection->fd, body, most, 0);
    if (got <= 0) return 0;
    connection->missing -= got;
    return connection->missing || reply(connection);
}

int main(int argc, char **argv) {
    if (argc != 2) return 2;
    answer_bytes = snprintf(answer, sizeof answer,
                            "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %zu\r\n\r\n%s",
                            sizeof CHAT - 1, CHAT);
    int on = 1, listener = socket(AF_INET, SOCK_STREAM, 0);
    struct sockaddr_in where = {.sin_family = AF_INET, .sin_port = htons(atoi(argv[1])),
                                .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (bind(listener, (struct sockaddr *)&where, sizeof where)) die("bind");
    if (listen(listener, 4096)) die("listen");
    int poll = epoll_create1(0);
    struct epoll_event event = {.events = EPOLLIN}, events[EVENTS];
    epoll_ctl(poll, EPOLL_CTL_ADD, listener, &event);
    for (;;) {
        int count = epoll_wait(poll, events, EVENTS, -1);
        for (int i = 0; i < count; i++) {
            struct connection *connection = events[i].data.ptr;
            if (!connection) {
                connection = calloc(1, sizeof *connection);
                if (!connection || (connection->fd = accept(listener, NULL, NULL)) < 0) die("accept");
                setsockopt(connection->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
                event.data.ptr = connection;
                epoll_ctl(poll, EPOLL_CTL_ADD, connection->fd, &event);
            } else if (!(connection->missing ? read_body(connection) : read_head(connection))) {
                close(connection->fd);
                free(connection);
            }
        }
    }
}
